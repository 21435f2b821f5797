"""What goes into each linear layer on real text: the data of calibrated methods."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from train_then_compress.config.parts import in_embedding
from train_then_compress.models.early_exit import nobody_leaves
from train_then_compress.training.task import Task, text_at

Visit = Callable[[str, Tensor], None]


def blocks(names: Iterable[str]) -> list[list[str]]:
    """Names of layers in their order, those of a Transformer block together; any other layer is a block of its own.

    Methods that calibrate layers on what compressed ones before them give take a block at once, as their authors' code
    does: layer by layer it would take several times as many passes.
    """
    found: dict[str, list[str]] = {}
    for name in names:
        block = re.match(r".*?\.\d+\.", name)
        found.setdefault(block[0] if block else name, []).append(name)
    return list(found.values())


def linear_inputs(
    model: nn.Module, task: Task, parts: Iterable[Any], visit: Visit, only: Collection[str] | None = None
) -> None:
    """Run pieces of batches through the model and show ``visit`` what each linear layer is given.

    ``visit(name, inputs)``: the name of the layer's weight and float32 [rows, inputs], one row a position; padding and
    places that only fill up a batch are left out. In fp32 and without dropout, and no example exits early. A factored
    embedding, which is looked up, is not shown. ``only`` these layers, if given.
    """
    training = model.training
    model.eval()
    current: dict[str, Any] = {}

    def show(name: str, module: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        inputs = arguments[0].detach()
        part = current["part"]
        if inputs.dim() == 3:
            visit(name, inputs[text_at(part, name)].float())
        else:
            visit(name, inputs[: part.terms].float())

    hooks = [
        module.register_forward_pre_hook(partial(show, f"{name}.weight"))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not in_embedding(name) and (only is None or f"{name}.weight" in only)
    ]
    try:
        with torch.inference_mode(), nobody_leaves(model):
            for part in parts:
                current["part"] = part
                task.logits(model, part)
    finally:
        for hook in hooks:
            hook.remove()
        model.train(training)


def second_moments(
    model: nn.Module, task: Task, parts: Iterable[Any], only: Collection[str] | None = None
) -> dict[str, Tensor]:
    """For each linear layer (or ``only`` these), by its weight's name, the mean of ``x xᵀ`` over its inputs.

    float64 [inputs, inputs]; a layer that no input reached is left out.
    """
    sums: dict[str, Tensor] = {}
    rows: dict[str, int] = {}

    def add(name: str, inputs: Tensor) -> None:
        wide = inputs.double()
        sums[name] = sums.get(name, 0) + wide.T @ wide
        rows[name] = rows.get(name, 0) + len(inputs)

    linear_inputs(model, task, parts, add, only)
    return {name: total / rows[name] for name, total in sums.items() if rows[name]}
