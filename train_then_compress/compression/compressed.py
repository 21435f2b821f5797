"""A model under compression: weights as they will be used, and what is known of each compressed matrix."""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config.parts import in_embedding, in_layers


def spread(values: Tensor, columns: int) -> Tensor:
    """Each group's value [.., groups] for each of its columns [.., columns].

    Groups are as long as each other; where they do not divide the columns, the last is shorter.
    """
    return values.repeat_interleave(-(-columns // values.shape[-1]), dim=-1)[..., :columns]


@dataclass(frozen=True)
class Codes:
    """A matrix in uniform quantization: ``weight = (codes - zero) * scale``.

    ``codes`` uint8 [rows, columns]; ``scale`` float16 and ``zero`` uint8 [1, 1] (per tensor), [rows, 1] (per channel)
    or [rows, groups], as in `spread`.
    """

    codes: Tensor
    scale: Tensor
    zero: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        columns = self.codes.shape[1]
        return (self.codes.float() - spread(self.zero.float(), columns)) * spread(self.scale.float(), columns)


@dataclass(frozen=True)
class Codebook:
    """A matrix whose weights are entries of codebooks: ``weight = centroids[group, code]``.

    ``codes`` uint8 [rows, columns]; ``centroids`` float16 [1, 1, kinds] (per tensor), [rows, 1, kinds] (per channel) or
    [rows, groups, kinds], as in `spread`.
    """

    codes: Tensor
    centroids: Tensor
    bits: int

    def dequantize(self) -> Tensor:
        """float32 [rows, columns]."""
        rows, columns = self.codes.shape
        groups = self.centroids.shape[1]
        padded = F.pad(self.codes, (0, -columns % groups)).view(rows, groups, -1)
        table = self.centroids.float().expand(rows, groups, -1)
        return table.gather(2, padded.long()).view(rows, -1)[:, :columns]


@dataclass
class Compressed:
    """``model`` holds the weights in use; ``masks`` (bool, true where kept) and ``codes`` by parameter name.

    ``structure`` lists what was changed about the architecture, in order, in a form that JSON takes: each entry's
    ``method`` names the module here whose ``rebuild(model, entry)`` makes the change to a fresh dense model.
    """

    model: nn.Module
    masks: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, Codes | Codebook] = field(default_factory=dict)
    structure: list[dict[str, Any]] = field(default_factory=list)

    def change(self, entry: dict[str, Any]) -> None:
        """Change the architecture of the model and remember how."""
        self.model = rebuild(self.model, entry)
        self.structure.append(entry)

    def mask_weights(self) -> None:
        """Set pruned weights to zero, in place."""
        parameters = dict(self.model.named_parameters())
        with torch.no_grad():
            for name, mask in self.masks.items():
                parameters[name].mul_(mask)


def rebuild(model: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """The model with one change of its architecture (see `Compressed.structure`); it may be the same object."""
    method = importlib.import_module(f"{__package__}.{entry['method']}")
    changed: nn.Module = method.rebuild(model, entry)
    return changed


def matrices(model: nn.Module, embeddings: bool) -> dict[str, Tensor]:
    """The weight matrices that compression works on: of every linear layer and, by choice, of embeddings of tokens.

    Biases, normalizations and position tables are left alone. A factored embedding has two matrices.
    """
    return {
        f"{name}.weight": module.weight for name, module in model.named_modules()
        if isinstance(module, nn.Linear | nn.Embedding) and (embeddings or not in_embedding(name))
    }  # fmt: skip


def weight_errors(dense: dict[str, Tensor], used: dict[str, Tensor]) -> tuple[float, dict[str, float]]:
    """Relative Frobenius error ``|W - W'| / |W|``, over all matrices together and for each matrix.

    Matrices that compression gave another shape (smaller, factored) are left out; where whole layers are gone, those of
    every layer of that side, since the names of the others have moved up.
    """
    moved = {side for side, _ in _layers(dense) - _layers(used)}
    errors, norms = {}, {}
    for name, weight in dense.items():
        same = name in used and used[name].shape == weight.shape and _layer(name)[0] not in moved
        if weight.dim() == 2 and same:
            errors[name] = float((weight - used[name]).norm())
            norms[name] = float(weight.norm())
    total = sum(e**2 for e in errors.values()) ** 0.5 / (sum(n**2 for n in norms.values()) ** 0.5 or 1.0)
    return total, {name: errors[name] / norms[name] if norms[name] else 0.0 for name in errors}


def _layers(weights: dict[str, Tensor]) -> set[tuple[str, str]]:
    return {_layer(name) for name in weights if in_layers(name)}


def _layer(name: str) -> tuple[str, str]:
    """The side of the model that a parameter belongs to, and the number of its layer there."""
    side, _, rest = name.partition(".layers.")
    return side, rest.split(".")[0]
