"""Low-rank factorization: a linear layer becomes two smaller ones by truncated singular value decomposition.

The best approximation of rank r in the Frobenius norm takes the r largest singular values of ``W`` (Eckart & Young
1936). Weighted by activations, the error of the outputs ``W x`` is least instead: the decomposition is that of ``W S``
with ``S Sᵀ = E[x xᵀ]`` (SVD-LLM, Wang et al. 2024, section 3.1). With the leading left singular vectors ``U`` of
``W S`` the approximation is ``U Uᵀ W`` (reduced-rank regression, Izenman 1975): no ``S`` has to be inverted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from train_then_compress.compression.bench import Bench
from train_then_compress.compression.calibration import second_moments
from train_then_compress.compression.compressed import Compressed
from train_then_compress.config.parts import EMBEDDINGS, in_layers
from train_then_compress.config.recipes import Step
from train_then_compress.config.steps import Svd
from train_then_compress.models.factored import Factored, FactoredEmbedding

#: Added to the second moments, as a share of their mean: directions that calibration never saw count a little.
_DAMPING = 1e-6


def apply(compressed: Compressed, step: Step, bench: Bench) -> None:
    """Factor what becomes smaller by it, and recover."""
    config = step.config
    assert isinstance(config, Svd)
    moments = {}
    if config.weighting == "activations":
        moments = second_moments(compressed.model, bench.task, bench.calibration(config.calibration_batches))
    factorize(compressed, step.strength, config, moments)
    bench.recover(compressed, config.recovery, config.recovery.max_steps)


def factorize(compressed: Compressed, strength: int, config: Svd, moments: Mapping[str, Tensor]) -> None:
    """Put factors in the place of what is larger than they are, without any training.

    ``moments``: E[x xᵀ] of linear layers' inputs, by the names of their weights; without one the weights' error counts.
    """
    factors: list[tuple[Tensor, Tensor] | None] = []
    for name, module in factorable(compressed.model, config.embeddings).items():
        weight = _matrix(module).detach().double()
        left, values = decompose(weight, moments.get(f"{name}.weight", moments.get(f"{name}.first.weight")))
        rank = rank_of(values, weight.shape, strength, config.rank)
        present = sum(parameter.numel() for parameter in module.parameters() if parameter.dim() == 2)
        factors.append(split(weight, left[:, :rank]) if rank * sum(weight.shape) < present else None)
    ranks = [len(pair[0]) if pair else 0 for pair in factors]
    compressed.change({"method": "svd", "embeddings": config.embeddings, "ranks": ranks})
    changed = factorable(compressed.model, config.embeddings).values()
    with torch.no_grad():
        for module, pair in zip(changed, factors, strict=True):
            if pair:
                first, second = (module.get_parameter(f"{which}.weight") for which in ("first", "second"))
                first.copy_(pair[0].T if isinstance(module, FactoredEmbedding) else pair[0])
                second.copy_(pair[1])


def rebuild(model: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """The model with factors of the ranks that the entry gives for `factorable`, in that order; 0 changes nothing."""
    found = factorable(model, entry["embeddings"])
    for (name, module), rank in zip(found.items(), entry["ranks"], strict=True):
        if rank:
            model.set_submodule(name, _factored(module, rank))
    return model


def factorable(model: nn.Module, embeddings: bool) -> dict[str, nn.Module]:
    """By name, linear layers inside layers and, by choice, embeddings of tokens, factored already or not."""
    found: dict[str, nn.Module] = {}
    for name, module in model.named_modules():
        inside_factored = name.rpartition(".")[0] in found
        if in_layers(name) and isinstance(module, nn.Linear | Factored) and not inside_factored:
            found[name] = module
    if embeddings:
        found |= {name: module for name, module in model.named_modules() if name.rpartition(".")[2] in EMBEDDINGS}
    return found


def decompose(weight: Tensor, moment: Tensor | None) -> tuple[Tensor, Tensor]:
    """Left singular vectors [outputs, n] and singular values [n], falling, of ``weight`` [outputs, inputs] or, given
    ``moment`` [inputs, inputs], of ``weight @ S``."""
    if moment is not None:
        variances, directions = torch.linalg.eigh(moment)
        damped = variances.clamp(min=0) + _DAMPING * moment.diagonal().mean()
        weight = weight @ (directions * damped.sqrt())
    left, values, _ = torch.linalg.svd(weight, full_matrices=False)
    return left, values


def rank_of(values: Tensor, shape: tuple[int, ...], strength: int, kind: str) -> int:
    """The rank whose factors hold at most ``strength`` per cent of the weights (``bytes``; at least 1), or the smallest
    that keeps ``strength`` per cent of the squared singular ``values``, falling (``energy``)."""
    outputs, inputs = shape
    if kind == "bytes":
        return max(1, strength * outputs * inputs // (100 * (outputs + inputs)))
    energy = values.square().cumsum(dim=0)
    return int((energy < strength / 100 * energy[-1]).sum()) + 1


def split(weight: Tensor, left: Tensor) -> tuple[Tensor, Tensor]:
    """``left leftᵀ weight`` as first [rank, inputs] and second factor [outputs, rank], of equal norms."""
    outward, values, inward = torch.linalg.svd(left.T @ weight, full_matrices=False)
    root = values.sqrt()
    return root[:, None] * inward, left @ outward * root


def _matrix(module: nn.Module) -> Tensor:
    """[outputs, inputs]; the inputs of an embedding are the tokens."""
    weight = module.weight
    assert isinstance(weight, Tensor)
    return weight if isinstance(module, nn.Linear | Factored) else weight.T


def _factored(module: nn.Module, rank: int) -> nn.Module:
    """A module of that rank for a linear layer, whose bias it gets, or for a look-up; its weights come later."""
    outputs, inputs = _matrix(module).shape
    if isinstance(module, nn.Linear | Factored):
        factored = Factored(inputs, outputs, rank)
        factored.second.bias = module.bias
        return factored.to(_matrix(module))
    return FactoredEmbedding(inputs, outputs, rank).to(_matrix(module))
