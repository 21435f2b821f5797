"""The packed file: what a compressed model really costs to store.

One safetensors file. For a parameter ``p``:

- ``p``: stored whole, in the file's dtype;
- ``p:mask`` and ``p:values``: pruned; one bit a weight (1 = kept), then the kept weights in the file's dtype;
- ``p:codes``, ``p:scale`` (float16), ``p:zero`` (uint8, only if it differs within the matrix): quantized, codes packed
  without gaps; with ``p:mask`` too where leaving out the pruned codes saves more than the mask costs.

The metadata's ``layout`` gives shape and bits; bits are packed little end first.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor, nn

from train_then_compress.compression.compressed import Codes, Compressed

FORMAT = "train_then_compress packed 1"


def pack_bits(codes: Tensor, bits: int) -> Tensor:
    """uint8 codes below ``2 ** bits``, any shape -> uint8 [ceil(n * bits / 8)], without gaps."""
    flat = codes.reshape(-1, 1).numpy()
    each = np.unpackbits(flat, axis=1, count=bits, bitorder="little")
    return torch.from_numpy(np.packbits(each, bitorder="little"))


def unpack_bits(packed: Tensor, bits: int, count: int) -> Tensor:
    """The ``count`` codes that `pack_bits` took."""
    each = np.unpackbits(packed.numpy(), count=bits * count, bitorder="little").reshape(count, bits)
    return torch.from_numpy(np.packbits(each, axis=1, bitorder="little").reshape(count))


def pack(compressed: Compressed, dtype: torch.dtype, facts: dict[str, Any]) -> bytes:
    """The content of a packed file; ``dtype`` stores everything that is not quantized, ``facts`` go to its metadata."""
    tensors: dict[str, Tensor] = {}
    layout: dict[str, list[int]] = {}
    for name, parameter in compressed.model.named_parameters():
        weight, mask = parameter.detach().cpu(), compressed.masks.get(name)
        if name in compressed.codes:
            layout[name] = [compressed.codes[name].bits, *weight.shape]
            tensors |= _packed_codes(name, compressed.codes[name], None if mask is None else mask.cpu())
        elif mask is not None:
            layout[name] = [0, *weight.shape]
            tensors[f"{name}:mask"] = pack_bits(mask.cpu().to(torch.uint8), 1)
            tensors[f"{name}:values"] = weight[mask.cpu()].to(dtype)
        else:
            tensors[name] = weight.to(dtype).contiguous()
    metadata = {"format": FORMAT, "layout": json.dumps(layout, separators=(",", ":")), "facts": json.dumps(facts)}
    return save(tensors, metadata)


def _packed_codes(name: str, codes: Codes, mask: Tensor | None) -> dict[str, Tensor]:
    tensors = {f"{name}:scale": codes.scale}
    if bool((codes.zero != codes.zero.flatten()[0]).any()):
        tensors[f"{name}:zero"] = codes.zero
    else:
        tensors[f"{name}:zero"] = codes.zero.flatten()[:1].clone()
    if mask is not None and codes.bits * int((~mask).sum()) > mask.numel():
        tensors[f"{name}:mask"] = pack_bits(mask.to(torch.uint8), 1)
        tensors[f"{name}:codes"] = pack_bits(codes.codes[mask], codes.bits)
    else:
        tensors[f"{name}:codes"] = pack_bits(codes.codes, codes.bits)
    return tensors


def unpack(path: Path, model: nn.Module) -> Compressed:
    """Put a packed file's weights into ``model`` and return it with its masks and codes.

    Raises `ValueError` for a file that is not in this format or belongs to a model of another shape.
    """
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata() or {}
        if metadata.get("format") != FORMAT:
            raise ValueError(f"{path} is not a packed model of this project ({FORMAT})")
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    layout: dict[str, list[int]] = json.loads(metadata["layout"])
    result = Compressed(model)
    for name, (bits, *shape) in layout.items():
        if f"{name}:mask" in tensors:
            result.masks[name] = unpack_bits(tensors[f"{name}:mask"], 1, math.prod(shape)).view(shape).bool()
        if bits:
            result.codes[name] = _unpacked_codes(name, bits, shape, tensors, result.masks.get(name))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_weight(name, tensors, result))
    return result


def facts(path: Path) -> dict[str, Any]:
    """What was said of a packed file when it was written."""
    with safe_open(path, framework="pt") as file:
        said: dict[str, Any] = json.loads(file.metadata()["facts"])
    return said


def _unpacked_codes(name: str, bits: int, shape: list[int], tensors: dict[str, Tensor], mask: Tensor | None) -> Codes:
    scale, zero = tensors[f"{name}:scale"], tensors[f"{name}:zero"]
    zero = zero.view(1, 1).expand(scale.shape) if zero.dim() == 1 else zero
    packed = tensors[f"{name}:codes"]
    if mask is None:
        return Codes(unpack_bits(packed, bits, math.prod(shape)).view(shape), scale, zero, bits)
    pruned_code = zero.repeat_interleave(shape[1] // zero.shape[1], dim=1).expand(shape)
    kept = unpack_bits(packed, bits, int(mask.sum()))
    return Codes(pruned_code.masked_scatter(mask, kept), scale, zero, bits)


def _weight(name: str, tensors: dict[str, Tensor], compressed: Compressed) -> Tensor:
    if name in compressed.codes:
        return compressed.codes[name].dequantize()
    if name in compressed.masks:
        mask = compressed.masks[name]
        return torch.zeros(mask.shape).masked_scatter_(mask, tensors[f"{name}:values"].float())
    return tensors[name]
