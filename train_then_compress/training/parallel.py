"""Data parallelism by torch.distributed; with one process every function here does nothing."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor


def ranks() -> int:
    """The number of processes that train together."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """This process's number; rank 0 writes."""
    return dist.get_rank() if dist.is_initialized() else 0


def sum_over_ranks(values: Iterable[float], device: torch.device | str = "cpu") -> list[float]:
    """Element-wise sums over all ranks, in double precision."""
    return _reduced(list(values), device, dist.ReduceOp.SUM)


def largest_over_ranks(values: Iterable[float], device: torch.device | str = "cpu") -> list[float]:
    """Element-wise maxima over all ranks: how ranks agree on the time and on whether to stop."""
    return _reduced(list(values), device, dist.ReduceOp.MAX)


def _reduced(values: list[float], device: torch.device | str, operation: dist.ReduceOp.RedOpType) -> list[float]:
    if ranks() == 1:
        return values
    tensor = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(tensor, op=operation)
    result: list[float] = tensor.tolist()
    return result


def of_all_ranks(values: list[str]) -> list[list[str]]:
    """Every rank's values, on every rank."""
    found: list[list[str]] = [values] * ranks()
    if ranks() > 1:
        dist.all_gather_object(found, values)
    return found


def sum_gradients(gradients: list[Tensor]) -> None:
    """Add up the ranks' gradients in place, in one message."""
    if ranks() > 1:
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(summed.view_as(gradient))


def wait_for_all() -> None:
    """Return when every rank has come here."""
    if ranks() > 1:
        dist.barrier()
