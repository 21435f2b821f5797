"""What the tests share: small models of every kind; for whole stages a task, those of a recipe, a bench for them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.recipe import compress
from train_then_compress.config import RobertaConfig, TransformerConfig
from train_then_compress.cost.flops import forward_flops
from train_then_compress.data.prepare import EOS, PAD
from train_then_compress.models.layers import EncoderLayer
from train_then_compress.models.roberta import Classifier, MaskedLM
from train_then_compress.models.transformer import Translator
from train_then_compress.records import RunDirectory, StageKey, plan
from train_then_compress.tasks import RunTask
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.training import interrupt
from train_then_compress.training.checkpoint import Checkpoints


class SmallModels:
    """Makes models far from initialization, so that every part matters: four heads of 8 and 128 FFN units a layer."""

    vocabulary, length = 60, 12

    def __call__(self, kind: str = "mlm", seed: int = 0, **changes: Any) -> nn.Module:
        torch.manual_seed(seed)
        shape: dict[str, Any] = {"depth": 2, "width": 32, "head_size": 8, "dropout": 0.0} | changes
        model: nn.Module
        if kind == "translation":
            model = Translator(TransformerConfig(**shape), self.vocabulary, self.length)
        elif kind == "mlm":
            model = MaskedLM(RobertaConfig(**shape), self.vocabulary, self.length)
        else:
            model = Classifier(RobertaConfig(**shape), self.vocabulary, self.length, 3)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))
        return model.eval()

    def tokens(self, rows: int = 3, seed: int = 3) -> Tensor:
        """[rows, length]; the last is padded."""
        generator = torch.Generator().manual_seed(seed)
        tokens = torch.randint(5, self.vocabulary, (rows, self.length), generator=generator)
        tokens[-1, 8:] = PAD
        return tokens

    def targets(self, rows: int = 3) -> Tensor:
        """What a decoder reads, [rows, length - 2]; the last is padded."""
        return torch.cat([torch.full((rows, 1), EOS), self.tokens(rows, seed=4)[:, : self.length - 3]], dim=1)

    def arguments(self, model: nn.Module) -> tuple[Tensor, ...]:
        """What it is called with to predict at every position."""
        if isinstance(model, Classifier):
            return (self.tokens(),)
        given = (self.tokens(), self.targets()) if isinstance(model, Translator) else (self.tokens(),)
        return *given, torch.arange(given[-1].numel())

    def logits(self, model: nn.Module) -> Tensor:
        with torch.inference_mode():
            logits: Tensor = model(*self.arguments(model))
        return logits

    def layers(self, model: nn.Module) -> list[Any]:
        """The encoder's, then the decoder's."""
        return [module for module in model.modules() if isinstance(module, EncoderLayer)]

    def flops(self, model: nn.Module) -> tuple[float, int]:
        """Of a forward pass over two sequences: as they are counted, and of the products that torch's counter sees."""
        tokens, target, five = self.tokens(2), self.targets(2), torch.arange(5)
        count = forward_flops(model)
        expected = count.per_token(self.length) * tokens.numel()
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
            if isinstance(model, Translator):
                model(tokens, target, five)
                expected = count.translating(tokens.shape, target.shape, 5)
            elif isinstance(model, MaskedLM):
                model(tokens, five)
                expected += 5 * count.per_prediction
            else:
                model(tokens)
                expected += 2 * count.per_prediction
        return expected, counter.get_total_flops()


@pytest.fixture(scope="session")
def small() -> SmallModels:
    """A function that makes a small model, ``small("translation", depth=3)``, and what it is tried on."""
    return SmallModels()


@pytest.fixture(scope="session")
def labelled() -> dict[str, Any]:
    """What a config of classification must say."""
    return {
        "task": {"name": "classification"}, "data": {"name": "csv_files", "train": "a.csv"}, "pretrain": {},
        "budget": {"kind": "epochs", "value": 1},
    }  # fmt: skip


@dataclass(frozen=True)
class Stand:
    """A dense model that was only initialized, a recipe's stages, and where they are worked on."""

    model: nn.Module
    stages: list[StageKey]
    bench: Bench

    @property
    def task(self) -> RunTask:
        assert isinstance(self.bench.task, RunTask)
        return self.bench.task

    def compress(self) -> Compressed:
        return compress(self.model, self.stages, self.bench)

    def logits(self, model: nn.Module) -> torch.Tensor:
        """Of the first training batch, without dropout."""
        (part,) = self.task.parts(self.task.batch(0), 0, 1, 0)
        with torch.inference_mode():
            return self.task.logits(model.eval(), part)

    def assert_comes_back(self, compressed: Compressed, directory: Path) -> None:
        """A packed file gives a fresh model the same weights, masks and logits."""
        path = directory / "packed.safetensors"
        path.write_bytes(pack(compressed, torch.float32, {}))
        back = unpack(path, self.task.new_model())
        expected = dict(compressed.model.named_parameters())
        assert all(torch.equal(parameter, expected[name]) for name, parameter in back.model.named_parameters())
        assert all(torch.equal(mask, compressed.masks[name]) for name, mask in back.masks.items())
        assert torch.equal(self.logits(back.model), self.logits(compressed.model))


@pytest.fixture
def stand(build_task: Callable[..., RunTask], tmp_path: Path) -> Callable[..., Stand]:
    """A function that makes a `Stand`: ``stand("movement60", task="classification", movement={..}, directory="a")``."""

    def make(recipe: str, task: str = "mlm", directory: str = "run", **steps: Any) -> Stand:
        place = build_task(task, model={"depth": 1}, optimizer={"lr": 3e-3}, recipes=[recipe], steps=steps)
        model = place.new_model()
        run = RunDirectory(tmp_path / directory)
        planned = plan(place.config, "data", {})
        bench = Bench(place, place.config, run, MetricsLog(run.metrics), 100.0, model, planned.dense)
        return Stand(model, planned.recipes[recipe], bench)

    return make


@pytest.fixture
def make_bench(build_task: Callable[..., RunTask], tmp_path: Path) -> Callable[..., Bench]:
    """A function that gives the bench of a task in a directory, with an untrained ``teacher``; overrides as in
    `build_task`: ``make_bench("mlm", "run", model={"depth": 1})``."""

    def make(task: str = "mlm", directory: str = "run", **overrides: Any) -> Bench:
        place, run = build_task(task, **overrides), RunDirectory(tmp_path / directory)
        model = place.new_model()
        return Bench(place, place.config, run, MetricsLog(run.metrics), 0.0, model, StageKey("stage", "7" * 64))

    return make


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[Stand, int], dict[str, torch.Tensor]]:
    """A function that works on a stage's training until it is stopped after so many steps, and gives its checkpoint."""

    def stop(place: Stand, step: int) -> dict[str, torch.Tensor]:
        steps = iter(range(1, step + 1))
        with monkeypatch.context() as patch:
            patch.setattr(interrupt, "requested", lambda: next(steps) == step)
            with pytest.raises(interrupt.Interrupted, match=f"step {step}"):
                place.compress()
        snapshot = Checkpoints(place.bench.run.checkpoints(place.stages[-1]), 1e9).latest()
        assert snapshot is not None and snapshot.clock.steps == step
        return snapshot.model

    return stop
