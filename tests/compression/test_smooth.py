"""SmoothQuant: the same function before rounding, torch's int8 rounding, and what it is for: outlier channels."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.ao.quantization.observer import MinMaxObserver, PerChannelMinMaxObserver

from train_then_compress.compression import smooth
from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.prune import prune
from train_then_compress.compression.smooth import SmoothLinear
from train_then_compress.config import ConfigError, RobertaConfig, parse_recipe
from train_then_compress.config.steps import Prune
from train_then_compress.data.prepare import PAD
from train_then_compress.models.layers import EncoderLayer
from train_then_compress.point import costs

MakeBench = Callable[..., Bench]
WIDTH = 32
OUTLIER = 60
#: By task, the linear layers inside the layers of two of each side.
LAYERS = {"mlm": 8, "classification": 8, "translation": 22}


@pytest.fixture
def outlying(make_bench: MakeBench) -> MakeBench:
    """A function that gives the bench of a task; its ``teacher`` is a model with outliers: ``outlying("mlm")``."""

    def make(task: str = "mlm", norm: str = "pre") -> Bench:
        bench = make_bench(task, model={"depth": 2, "norm": norm})
        add_outliers(bench.teacher.eval())
        return bench

    return make


def add_outliers(model: nn.Module) -> None:
    """Nothing keeps its initial zero or one; before each linear layer one channel is `OUTLIER` times as large, and the
    weights that meet it as much smaller (before those that a post-norm layer's output goes to, none)."""
    torch.manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
        layers: list[Any] = [module for module in model.modules() if isinstance(module, EncoderLayer)]
        for layer in layers:
            attention, feed_forward = layer.attention, layer.feed_forward
            spoil_values(attention.query_key_value, attention.output)
            feed_forward.inner.bias[11] += OUTLIER / 2
            feed_forward.outer.weight[:, 11] /= OUTLIER
            if hasattr(layer, "cross_attention"):
                spoil_values(layer.cross_attention.key_value, layer.cross_attention.output)
            if layer.pre_norm:
                spoil(layer.attention_norm, attention.query_key_value)
                spoil(layer.feed_forward_norm, feed_forward.inner)
                if hasattr(layer, "cross_attention"):
                    spoil(layer.cross_attention_norm, layer.cross_attention.query)
        decoder: Any = getattr(model, "decoder", None)
        if decoder is not None and layers[0].pre_norm:
            spoil(model.get_submodule("encoder.final_norm"), *(layer.cross_attention.key_value for layer in decoder))


def spoil(norm: Any, *readers: nn.Linear) -> None:
    """Channel 3 becomes large, and those who read it take that back."""
    norm.weight[3] *= OUTLIER
    norm.bias[3] *= OUTLIER
    for linear in readers:
        linear.weight[:, 3] /= OUTLIER


def spoil_values(projection: nn.Linear, output: nn.Linear) -> None:
    """The last of what is projected are values: the same for one of them."""
    projection.weight[len(projection.weight) - WIDTH + 5] *= OUTLIER
    output.weight[:, 5] /= OUTLIER


def smoothed_by(bench: Bench, model: nn.Module | None = None, **settings: Any) -> Compressed:
    settings = {"calibration_batches": 2} | settings
    (step,) = parse_recipe("smooth8", {"smooth": settings}, bench.config.model, bench.config.task.name)
    compressed = Compressed(copy.deepcopy(model or bench.teacher))
    smooth.apply(compressed, step, bench)
    return compressed


def logits_of(bench: Bench, model: nn.Module) -> Tensor:
    """On a batch of another seed than that of calibration."""
    task = bench.task.with_seed(99)
    (part,) = task.parts(task.batch(0), 0, 1, 0)
    with torch.inference_mode():
        return task.logits(model.eval(), part)[: part.terms]


def smooth_layers(model: nn.Module) -> dict[str, SmoothLinear]:
    return {name: module for name, module in model.named_modules() if isinstance(module, SmoothLinear)}


@pytest.mark.parametrize("alpha", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("norm", ["pre", "post"])
@pytest.mark.parametrize("task", LAYERS)
def test_without_rounding_nothing_changes(
    outlying: MakeBench, monkeypatch: pytest.MonkeyPatch, task: str, norm: str, alpha: float
) -> None:
    bench = outlying(task, norm)
    monkeypatch.setattr(smooth, "rounded", lambda x, step: x)
    compressed = Compressed(copy.deepcopy(bench.teacher))
    ranges = smooth.input_ranges(compressed.model, bench, 2)
    compressed.change({"method": "smooth", "static": False, "smoothed": True})
    after = smooth.smooth(compressed.model, ranges, alpha)
    expected = logits_of(bench, bench.teacher)
    assert torch.allclose(logits_of(bench, compressed.model), expected, rtol=1e-3, atol=1e-4 * float(expected.std()))

    layers, seen = smooth_layers(compressed.model), smooth.input_ranges(compressed.model, bench, 2)
    fed = ("query_key_value", "inner", "cross_attention.query")
    folded = {name for name in layers if norm == "pre" and name.endswith(fed)}
    assert len(layers) == LAYERS[task] and {name for name, layer in layers.items() if layer.smoothing is None} == folded
    for name, layer in layers.items():
        assert not torch.allclose(layer.weight, bench.teacher.get_parameter(f"{name}.weight"), rtol=0.05)
        inside = seen[name] if layer.smoothing is None else seen[name] / layer.smoothing
        assert torch.allclose(inside, after[name], rtol=1e-3), name


def test_scales_are_equation_4() -> None:
    generator = torch.Generator().manual_seed(0)
    inputs, weight = torch.rand(6, generator=generator) * 9, torch.randn(4, 6, generator=generator)
    inputs[2], weight[:, 4] = 0, 0
    for alpha in (0.0, 0.25, 0.5, 1.0):
        scales = smooth.smoothing_scales(inputs, weight, alpha)
        for j in range(6):
            largest = max(abs(float(weight[i, j])) for i in range(4))
            expected = float(inputs[j]) ** alpha / largest ** (1 - alpha) if j not in (2, 4) else 1.0
            assert float(scales[j]) == pytest.approx(expected, rel=2**-8)
        assert torch.equal(scales, scales.bfloat16().float())
    half = smooth.smoothing_scales(inputs, weight, 0.5)  # in the middle both sides become equally large
    alive = [0, 1, 3, 5]
    assert torch.allclose((inputs / half)[alive], (weight * half).abs().amax(0)[alive], rtol=0.02)


def linear_layer(static: bool) -> SmoothLinear:
    torch.manual_seed(1)
    return SmoothLinear(nn.Linear(16, 5), divides=True, static=static, rescaled=True)


def test_static_rounding_of_activations_is_torchs() -> None:
    layer = linear_layer(static=True)
    x = 3 * torch.randn(4, 7, 16)
    observer = MinMaxObserver(torch.qint8, torch.per_tensor_symmetric, quant_min=-127, quant_max=127)
    observer(x[:2])
    step, zero = observer.calculate_qparams()
    assert layer.step is not None and layer.smoothing is not None
    with torch.no_grad():
        layer.step.copy_(step)
        layer.smoothing.fill_(2.0)
    expected = torch.fake_quantize_per_tensor_affine(x, float(step), int(zero), -127, 127)
    assert torch.allclose(smooth.rounded(x, step), expected, rtol=1e-6)
    assert expected.abs().max() < x.abs().max()  # some lie beyond the range that was seen
    assert torch.allclose(layer(2 * x), F.linear(expected, layer.weight, layer.bias), rtol=1e-5, atol=1e-5)


def test_dynamic_rounding_of_activations_is_torchs_for_each_token() -> None:
    layer = linear_layer(static=False)
    x = torch.randn(4, 7, 16) * torch.logspace(-3, 2, 28).view(4, 7, 1)
    rows = x.view(28, 16)
    observer = PerChannelMinMaxObserver(
        0, torch.qint8, torch.per_channel_symmetric, quant_min=-127, quant_max=127, eps=1e-30
    )
    observer(rows)
    step, zero = observer.calculate_qparams()
    expected = torch.fake_quantize_per_channel_affine(rows, step, zero.float(), 0, -127, 127).view_as(x)
    assert torch.allclose(smooth.dynamic_steps(x).flatten(), step, rtol=1e-6)
    assert torch.allclose(layer(x), F.linear(expected, layer.weight, layer.bias), rtol=1e-4, atol=1e-5)
    nothing = torch.zeros(2, 16)
    assert torch.equal(smooth.rounded(nothing, smooth.dynamic_steps(nothing)), nothing)


@pytest.mark.parametrize("task", ["mlm", "translation"])
def test_static_ranges_are_those_of_real_positions_in_calibration(outlying: MakeBench, task: str) -> None:
    bench = outlying(task)
    compressed = smoothed_by(bench, alpha=None, activations="static")
    observers: dict[str, MinMaxObserver] = {}
    parts: list[Any] = []

    def watch(name: str) -> Callable[..., None]:
        observer = MinMaxObserver(torch.qint8, torch.per_tensor_symmetric, quant_min=-127, quant_max=127)
        observers[name] = observer

        def observe(module: nn.Module, inputs: tuple[Tensor]) -> None:
            of_target = name.startswith("decoder") and not name.endswith(".key_value")
            observer(inputs[0][(parts[-1].target if of_target else parts[-1].tokens) != PAD])

        return observe

    model = copy.deepcopy(bench.teacher)
    for name in smooth_layers(compressed.model):
        model.get_submodule(name).register_forward_pre_hook(watch(name))
    for part in bench.calibration(2):
        parts.append(part)
        bench.task.logits(model, part)
    assert any(bool((part.tokens == PAD).any()) for part in parts)
    for name, layer in smooth_layers(compressed.model).items():
        step, _ = observers[name].calculate_qparams()
        assert layer.step is not None and float(layer.step) == pytest.approx(float(step), rel=2**-8), name
        assert layer.smoothing is None


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize("task", LAYERS)
def test_with_outlier_channels_smoothing_errs_less(outlying: MakeBench, task: str, activations: str) -> None:
    bench = outlying(task)
    dense, settings = logits_of(bench, bench.teacher), {"activations": activations, "granularity": "channel"}
    errors = {
        alpha: float((logits_of(bench, smoothed_by(bench, alpha=alpha, **settings).model) - dense).norm())
        for alpha in (None, 0.5)
    }
    assert 0 < errors[0.5] < 0.5 * errors[None] and errors[0.5] < 0.1 * float(dense.norm())


@pytest.mark.parametrize("granularity", ["tensor", "channel"])
@pytest.mark.parametrize("embeddings", [True, False])
@pytest.mark.parametrize("task", ["mlm", "translation"])
def test_weights_are_rounded_after_smoothing_and_heads_are_left(
    outlying: MakeBench, granularity: str, embeddings: bool, task: str
) -> None:
    bench = outlying(task)
    unrounded = Compressed(copy.deepcopy(bench.teacher))
    ranges = smooth.input_ranges(unrounded.model, bench, 2)
    unrounded.change({"method": "smooth", "static": False, "smoothed": True})
    smooth.smooth(unrounded.model, ranges, 0.5)
    compressed = smoothed_by(bench, granularity=granularity, embeddings=embeddings)
    expected = {f"{name}.weight" for name in smooth_layers(compressed.model)}
    table = "embedding.weight" if task == "translation" else "encoder.embedding.weight"
    assert set(compressed.codes) == expected | ({table} if embeddings else set())
    for name, parameter in compressed.model.named_parameters():
        before = unrounded.model.get_parameter(name)
        codes = compressed.codes.get(name)
        if codes is None:
            assert torch.equal(parameter, before), name
            continue
        assert codes.bits == 8 and torch.equal(parameter, codes.dequantize())
        shape = (1, 1) if granularity == "tensor" else (len(parameter), 1)
        scale = before.detach().abs().reshape(shape[0], -1).amax(1).view(shape) / 127
        assert torch.allclose(codes.scale.float(), scale, rtol=2**-10, atol=2**-24)  # type: ignore[union-attr]
        assert ((parameter - before).abs() <= (0.5 + 127 * 2**-11) * scale + 127 * 2**-25).all(), name
    assert bench.ledger.calibration_tokens > 0


@pytest.mark.parametrize("activations", ["dynamic", "static"])
@pytest.mark.parametrize(
    "task, norm",
    [("mlm", "pre"), ("mlm", "post"), ("classification", "pre"), ("translation", "pre"), ("translation", "post")],
)
def test_a_packed_file_gives_the_same_logits(
    outlying: MakeBench, tmp_path: Path, task: str, norm: str, activations: str
) -> None:
    bench = outlying(task, norm)
    compressed = smoothed_by(bench, activations=activations)
    path = tmp_path / "packed.safetensors"
    for dtype in (torch.float32, torch.bfloat16):
        path.write_bytes(pack(compressed, dtype, {}))
        back = unpack(path, bench.task.new_model())  # type: ignore[attr-defined]
        assert pack(back, dtype, {}) == path.read_bytes()
        for name, layer in smooth_layers(compressed.model).items():
            for kept in ("weight", "smoothing", "step"):  # also in bf16 nothing of them is lost
                first, second = getattr(layer, kept), getattr(back.model.get_submodule(name), kept)
                assert (first is None and second is None) or torch.equal(first, second), (name, kept)
        if dtype == torch.float32:
            assert torch.equal(logits_of(bench, back.model), logits_of(bench, compressed.model))


def test_pruned_weights_stay_zero(outlying: MakeBench) -> None:
    bench = outlying()
    pruned = Compressed(copy.deepcopy(bench.teacher))
    prune(pruned, 0.6, Prune())
    with torch.no_grad():  # a channel that meets only zeros
        pruned.masks["encoder.layers.0.feed_forward.outer.weight"][:, 9] = False
    pruned.mask_weights()
    (step,) = parse_recipe("smooth8", {"smooth": {"calibration_batches": 1}}, bench.config.model)
    smooth.apply(pruned, step, bench)
    for name, mask in pruned.masks.items():
        weight = pruned.model.get_parameter(name)
        assert not weight[~mask].any() and weight.isfinite().all(), name
        if name in pruned.codes:
            assert torch.equal(weight, pruned.codes[name].dequantize())
    assert logits_of(bench, pruned.model).isfinite().all()


def test_a_layer_that_calibration_never_reaches_is_only_rounded(outlying: MakeBench) -> None:
    bench = outlying()
    model = copy.deepcopy(bench.teacher)
    spare = nn.Linear(WIDTH, 4)
    model.get_submodule("encoder.layers.1").spare = spare
    compressed = smoothed_by(bench, model, activations="static")
    layer = compressed.model.get_submodule("encoder.layers.1.spare")
    assert isinstance(layer, SmoothLinear) and layer.step is not None and layer.smoothing is not None
    assert float(layer.step) == 1 and torch.equal(layer.smoothing, torch.ones(WIDTH))
    assert torch.allclose(layer.weight, spare.weight, atol=float(spare.weight.abs().max()) / 127)


def test_rescaled_weights_are_not_compared_with_the_dense_ones(outlying: MakeBench, tmp_path: Path) -> None:
    bench = outlying()
    for name in ("model.safetensors", "packed.safetensors"):
        (tmp_path / name).write_bytes(b"12345")
    for alpha, compared in ((0.5, False), (None, True)):
        stored = smoothed_by(bench, alpha=alpha, granularity="channel").model
        packed = tmp_path / "packed.safetensors"
        row = costs(bench.teacher, stored, bench.task, packed, tmp_path)  # type: ignore[arg-type]
        layers = [name for name in row["weight_errors"] if name.startswith("encoder.layers.")]
        assert bool(layers) == compared and 0 < row["weight_errors"]["encoder.embedding.weight"] < 0.02
        assert all(row["weight_errors"][name] < 0.02 for name in layers)


@pytest.mark.parametrize(
    "recipe, settings, words",
    [
        ("smooth4", {}, "recipes: smooth4: bits must be 8, of weights and activations"),
        ("smooth16", {}, "recipes: smooth16: bits must be 8"),
        ("smooth", {}, "'smooth' is not a method and a strength"),
        ("smooth8+prune30", {}, "smooth8 must be the last step"),
        ("smooth8", {"alpha": 1.5}, "steps.smooth.alpha=1.5: must be less than or equal to 1"),
        ("smooth8", {"alpha": -0.1}, "steps.smooth.alpha=-0.1: must be greater than or equal to 0"),
        ("smooth8", {"activations": "none"}, "steps.smooth.activations='none': must be 'dynamic' or 'static'"),
        ("smooth8", {"granularity": "group"}, "steps.smooth.granularity='group': must be 'tensor' or 'channel'"),
        ("smooth8", {"calibration_batches": 0}, "steps.smooth.calibration_batches=0: must be greater than or equal"),
    ],
)
def test_what_cannot_be_is_refused(recipe: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        parse_recipe(recipe, {"smooth": settings}, RobertaConfig(depth=1, width=32, head_size=16))
    assert words in str(error.value)
