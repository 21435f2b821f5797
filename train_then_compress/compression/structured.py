"""Structured pruning: attention heads, FFN units and whole layers are removed, and the model is smaller afterwards.

Importance by the first-order Taylor expansion of the loss in a gate on each unit, which stands at 1 (Molchanov et al.
2019, equation 8; Michel et al. 2019, section 4.1), or by the norm of the unit's weights. Each stage removes units until
``strength`` per cent of the *original* number are gone, and recovers. In a decoder the heads of self-attention and of
attention to the source are units alike; encoder and decoder lose the same share of their layers.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train_then_compress.compression.bench import Bench
from train_then_compress.compression.compressed import Compressed
from train_then_compress.config.parts import SIDES
from train_then_compress.config.recipes import Step
from train_then_compress.config.steps import Structured
from train_then_compress.models.factored import Factored
from train_then_compress.models.layers import EncoderLayer, FeedForward, SelfAttention
from train_then_compress.models.transformer import CrossAttention
from train_then_compress.training.task import Task

#: By name float64 [its units]: the heads of an attention, the inner units of a feed-forward network, a layer as one.
Scores = dict[str, Tensor]
Attention = SelfAttention | CrossAttention


def apply(compressed: Compressed, step: Step, bench: Bench) -> None:
    """Remove units until ``step.strength`` per cent are gone, and recover."""
    config = step.config
    assert isinstance(config, Structured)
    if config.importance == "taylor":
        scores = taylor_scores(compressed.model, bench.task, bench.calibration(config.calibration_batches))
    else:
        scores = magnitude_scores(compressed.model)
    shrink(compressed, step.strength / 100, config, scores)
    bench.recover(compressed, config.recovery, config.recovery.max_steps)


def shrink(compressed: Compressed, share: float, config: Structured, scores: Scores) -> None:
    """Remove the units with the lowest scores until ``share`` of the original ones are gone, without any training."""
    original: Any = compressed.model.config
    layers = _layers(compressed.model)
    kept = list(layers)
    if "layers" in config.units:
        kept = []
        for side, depth in zip(SIDES, original.depths, strict=False):
            there = [name for name in layers if name.startswith(side)]
            stay = _largest(torch.cat([scores[name] for name in there]), depth - round(share * depth))
            kept += [there[number] for number in stay.tolist()]
    counts = {}
    for unit, kind, count in (("heads", Attention, original.heads), ("ffn", FeedForward, 4 * original.width)):
        modules = _inside({name: layers[name] for name in kept}, kind)
        here = share if unit in config.units else 0.0
        stays = choose([scores[name] for name in modules], count, here, config.scope)
        for module, units in zip(modules.values(), stays, strict=True):
            keep(module, units)
        counts[unit] = [len(units) for units in stays]
    compressed.change({"method": "structured", "layers": [list(layers).index(name) for name in kept], **counts})


def rebuild(model: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """The model with the layers that the entry names, a decoder's numbered after the encoder's, and of each of their
    attentions and feed-forward networks the first ``heads`` and ``ffn`` units."""
    layers = list(_layers(model).items())
    kept = dict(layers[number] for number in entry["layers"])
    for unit, kind in (("heads", Attention), ("ffn", FeedForward)):
        for module, count in zip(_inside(kept, kind).values(), entry[unit], strict=True):
            keep(module, torch.arange(count))
    for side in SIDES:
        if hasattr(model, side):
            there = [layer for name, layer in kept.items() if name.startswith(side)]
            model.get_submodule(side).layers = nn.ModuleList(there)
    return model


def keep(module: nn.Module, units: Tensor) -> None:
    """Leave an attention or a feed-forward network the units of these numbers, in place; what they compute does not
    change."""
    if isinstance(module, FeedForward):
        _select(module.inner, outputs=units)
        _select(module.outer, inputs=units)
        return
    assert isinstance(module, Attention)
    size = module.heads * module.head_size
    columns = torch.arange(size).view(module.heads, -1)[units].flatten()
    for projection in _projections(module):
        fused = range(len(projection.bias) // size)
        _select(projection, outputs=torch.cat([columns + which * size for which in fused]))
    _select(module.output, inputs=columns)
    module.heads = len(units)


def _select(module: nn.Linear | Factored, outputs: Tensor | None = None, inputs: Tensor | None = None) -> None:
    """Leave a linear layer, of low rank perhaps, the outputs or inputs of these numbers."""
    if isinstance(module, Factored):
        module = module.first if outputs is None else module.second
    if inputs is not None:
        module.weight = nn.Parameter(module.weight.detach()[:, inputs].contiguous())
    if outputs is not None:
        module.weight = nn.Parameter(module.weight.detach()[outputs])
        module.bias = nn.Parameter(module.bias.detach()[outputs])
    module.out_features, module.in_features = module.weight.shape


def choose(scores: list[Tensor], original: int, share: float, scope: str) -> list[Tensor]:
    """Numbers of the units that stay in each layer, ascending, when ``share`` of ``original`` a layer are gone.

    ``scope`` ``layer``: the highest scores of each layer. ``global``: of all layers, each layer's scores divided by
    their Euclidean norm (Michel et al. 2019, section 4.1). At least one stays in each layer.
    """
    if scope == "layer":
        return [_largest(score, max(1, original - round(share * original))) for score in scores]
    ranked = [score / (score.norm() or 1.0) for score in scores]
    for score in ranked:
        score[score.argmax()] = torch.inf
    everywhere = original * len(scores)
    stays = torch.zeros(sum(map(len, scores)), dtype=torch.bool)
    stays[_largest(torch.cat(ranked), max(len(scores), everywhere - round(share * everywhere)))] = True
    return [part.nonzero().flatten() for part in stays.split([len(score) for score in scores])]


def _largest(scores: Tensor, count: int) -> Tensor:
    """Where the ``count`` highest scores stand, ascending. Stable: of equal scores the earlier are left out first."""
    return scores.argsort(stable=True)[-count:].sort().values


def magnitude_scores(model: nn.Module) -> Scores:
    """Norms: of a head's rows of queries, keys and values and columns of the output; of an FFN unit's row and column;
    of all matrices of a layer. Biases are left out."""
    scores: Scores = {}
    for layer, inside in _layers(model).items():
        squares = {name: _squares(module) for name, module in _inside({layer: inside}, Attention | FeedForward).items()}
        squares[layer] = torch.stack([each.sum() for each in squares.values()]).sum().view(1)
        scores |= {name: each.sqrt().cpu() for name, each in squares.items()}
    return scores


def _squares(module: nn.Module) -> Tensor:
    """For each unit the sum of its weights' squares."""
    if isinstance(module, FeedForward):
        rows = module.inner.weight.detach().double().square().sum(dim=1)
        return rows + module.outer.weight.detach().double().square().sum(dim=0)
    assert isinstance(module, Attention)
    rows = torch.cat([projection.weight.detach().double().square().sum(dim=1) for projection in _projections(module)])
    columns = module.output.weight.detach().double().square().sum(dim=0)
    return torch.cat([rows, columns]).view(-1, module.heads, module.head_size).sum(dim=(0, 2))


def taylor_scores(model: nn.Module, task: Task, parts: Iterable[Any]) -> Scores:
    """``|dL / d gate|``, averaged over examples, with ``L`` an example's summed loss; no dropout.

    Every example has gates of its own, so that its gradient is not mixed with others' before the absolute value. A
    closed gate takes a head's or unit's output away, or skips a layer: ``x + gate * (layer(x) - x)``.
    """
    gates: dict[str, Tensor] = {}
    hooks = []
    layers = _layers(model)
    for name, module in _inside(layers, Attention | FeedForward).items():
        is_attention = isinstance(module, Attention)
        last, count = (module.output, module.heads) if is_attention else (module.outer, len(module.inner.bias))
        hooks.append(last.register_forward_pre_hook(partial(_gate_units, gates, name, count)))
    for name, layer in layers.items():
        hooks.append(layer.register_forward_hook(partial(_gate_layer, gates, name)))
    sums: Scores = {}
    examples, training = 0, model.training
    model.eval()
    try:
        for part in parts:
            loss, _ = task.loss(model, part)
            for name, gradient in zip(gates, torch.autograd.grad(loss, list(gates.values())), strict=True):
                sums[name] = sums.get(name, 0) + gradient.double().abs().sum(dim=0)
            examples += len(part.tokens)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)
    return {name: (total / examples).cpu() for name, total in sums.items()}


def _gate_units(
    gates: dict[str, Tensor], name: str, count: int, module: nn.Module, inputs: tuple[Tensor]
) -> tuple[Tensor]:
    """Multiply the ``count`` units in ``x`` [batch, length, all their outputs] by gates [batch, count] of 1."""
    (x,) = inputs
    gates[name] = gate = x.new_ones(len(x), count).requires_grad_()
    return ((x.unflatten(2, (count, -1)) * gate[:, None, :, None]).flatten(2),)


def _gate_layer(
    gates: dict[str, Tensor], name: str, layer: nn.Module, inputs: tuple[Any, ...], output: Tensor
) -> Tensor:
    """What comes out of a layer [batch, length, width], between its input and its output by gates [batch, 1] of 1."""
    gates[name] = gate = output.new_ones(len(output), 1).requires_grad_()
    return inputs[0] + gate[..., None] * (output - inputs[0])  # type: ignore[no-any-return]


def _layers(model: nn.Module) -> dict[str, EncoderLayer]:
    """By name, the encoder's, then the decoder's."""
    return {name: module for name, module in model.named_modules() if isinstance(module, EncoderLayer)}


def _inside(layers: Mapping[str, EncoderLayer], kind: Any) -> dict[str, Any]:
    """By name, the modules of a kind that layers are made of."""
    return {
        f"{layer}.{name}": module for layer, inside in layers.items() for name, module in inside.named_children()
        if isinstance(module, kind)
    }  # fmt: skip


def _projections(attention: Attention) -> list[Any]:
    """The linear layers that make queries, keys and values; of low rank perhaps."""
    return [module for name, module in attention.named_children() if name != "output"]
