"""The packed file: what a compressed model really costs to store.

One safetensors file of at most five tensors, into which every parameter puts its part, one after the other:

- ``values``: what is not quantized, in the file's dtype; of a pruned parameter the kept weights only;
- ``masks``: of pruned parameters, one bit a weight (1 = kept);
- ``codes``: of quantized parameters, packed without gaps; with a mask where leaving out the pruned codes saves more
  than the mask costs, or where no code stands for zero;
- ``scales`` (float16; codebooks' centroids too) and ``zeros`` (packed like the codes) of quantized parameters.

Few tensors, because each costs about 100 bytes of header: as much as a narrow layer's weights in 4 bits. The metadata's
one key holds the format, the facts, the structure (what was changed about the architecture) and the layout: name,
shape, bits, shape of the scales, the zero point where it is the same throughout, and whether there is a mask. Parts
begin at whole bytes; bits are packed little end first.
"""

from __future__ import annotations

import base64
import json
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn

from train_then_compress.compression.compressed import Codebook, Codes, Compressed, spread
from train_then_compress.records import Damaged

FORMAT = "train_then_compress packed 1"
_KEY = "packed"
_PARTS = ("values", "masks", "codes", "scales", "zeros")


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
    parts: dict[str, list[Tensor]] = {part: [] for part in _PARTS}
    layout: dict[str, Any] = {}
    for name, parameter in compressed.model.named_parameters():
        mask, codes = compressed.masks.get(name), compressed.codes.get(name)
        entry: dict[str, Any] = {"shape": list(parameter.shape)}
        if mask is not None and (not isinstance(codes, Codes) or codes.bits * int((~mask).sum()) > mask.numel()):
            mask = mask.cpu()
            parts["masks"].append(pack_bits(mask.to(torch.uint8), 1))
            entry["mask"] = True
        else:
            mask = torch.ones(parameter.shape, dtype=torch.bool)
        if codes is None:
            parts["values"].append(parameter.detach().cpu()[mask].to(dtype))
        else:
            parts["codes"].append(pack_bits(codes.codes[mask], codes.bits))
            entry |= _pack_scales(codes, parts)
        layout[name] = entry
    squeezed = base64.b64encode(zlib.compress(json.dumps(layout).encode(), 9)).decode()
    described: dict[str, Any] = {"format": FORMAT, "facts": facts, "layout": squeezed}
    if compressed.structure:
        described["structure"] = compressed.structure
    tensors = {part: torch.cat(pieces) for part, pieces in parts.items() if pieces}
    return save(tensors, {_KEY: json.dumps(described)})


def _pack_scales(codes: Codes | Codebook, parts: dict[str, list[Tensor]]) -> dict[str, Any]:
    """Append what turns codes into weights; what the layout must say of it."""
    if isinstance(codes, Codebook):
        parts["scales"].append(codes.centroids.flatten())
        return {"bits": codes.bits, "centroids": list(codes.centroids.shape)}
    parts["scales"].append(codes.scale.flatten())
    entry: dict[str, Any] = {"bits": codes.bits, "scales": list(codes.scale.shape)}
    if bool((codes.zero == codes.zero[0, 0]).all()):
        return entry | {"zero": int(codes.zero[0, 0])}
    parts["zeros"].append(pack_bits(codes.zero, codes.bits))
    return entry


def unpack(path: Path, model: nn.Module) -> Compressed:
    """Give ``model``, a dense one, a packed file's architecture and weights, and return it with its masks and codes.

    Raises `Damaged`, and `ValueError` for a file that is not in this format or belongs to a model of another shape.
    """
    metadata, tensors = _read(path)
    layout = json.loads(zlib.decompress(base64.b64decode(metadata["layout"])))
    result = Compressed(model)
    for change in metadata.get("structure", []):
        result.change(change)
    model = result.model
    take = _Taker(tensors)
    expected = {name: list(parameter.shape) for name, parameter in model.named_parameters()}
    stored = {name: entry["shape"] for name, entry in layout.items()}
    if stored != expected:
        first = next(name for name in {**stored, **expected} if stored.get(name) != expected.get(name))
        raise ValueError(f"{path} belongs to a model of another shape: {first} is {stored.get(first)} there, "
                         f"{expected.get(first)} here")  # fmt: skip
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            entry = layout[name]
            mask = torch.ones(entry["shape"], dtype=torch.bool)
            if entry.get("mask"):
                result.masks[name] = mask = take.bits("masks", 1, mask.numel()).view(entry["shape"]).bool()
            if "bits" in entry:
                result.codes[name] = codes = _codes(entry, mask, take)
                parameter.copy_(codes.dequantize() * mask)
            else:
                parameter.copy_(torch.zeros(mask.shape).masked_scatter_(mask, take("values", int(mask.sum())).float()))
    return result


def facts(path: Path) -> dict[str, Any]:
    """What was said of a packed file when it was written."""
    said: dict[str, Any] = _read(path)[0]["facts"]
    return said


def _read(path: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, Any] = json.loads((file.metadata() or {}).get(_KEY, "{}"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
    except (OSError, SafetensorError) as error:
        raise Damaged(path, error) from None
    if metadata.get("format") != FORMAT:
        raise ValueError(f"{path} is not a packed model of this project ({FORMAT})")
    return metadata, tensors


def _codes(entry: dict[str, Any], mask: Tensor, take: _Taker) -> Codes | Codebook:
    bits = entry["bits"]
    kept = take.bits("codes", bits, int(mask.sum()))
    if "centroids" in entry:
        shape = entry["centroids"]
        centroids = take("scales", math.prod(shape)).view(shape)
        return Codebook(torch.zeros(mask.shape, dtype=torch.uint8).masked_scatter(mask, kept), centroids, bits)
    groups = entry["scales"]
    scale = take("scales", math.prod(groups)).view(groups)
    if "zero" in entry:
        zero = torch.full(groups, entry["zero"], dtype=torch.uint8)
    else:
        zero = take.bits("zeros", bits, math.prod(groups)).view(groups)
    pruned_code = spread(zero, mask.shape[1]).expand(mask.shape)
    return Codes(pruned_code.masked_scatter(mask, kept), scale, zero, bits)


class _Taker:
    """Takes each parameter's part from the front of a tensor."""

    def __init__(self, tensors: dict[str, Tensor]):
        self._tensors, self._places = tensors, dict.fromkeys(tensors, 0)

    def __call__(self, part: str, count: int) -> Tensor:
        if not count:
            return self._tensors[part][:0] if part in self._tensors else torch.zeros(0, dtype=torch.uint8)
        start = self._places[part]
        self._places[part] += count
        return self._tensors[part][start : start + count]

    def bits(self, part: str, bits: int, count: int) -> Tensor:
        """``count`` numbers of so many bits."""
        return unpack_bits(self(part, -(-bits * count // 8)), bits, count)
