"""Layers whose weights stay in 4 bits while they are used: no dense copy of them is held.

torch's int4 kernel for CPUs multiplies straight from the codes where it takes their layout; elsewhere weights are
unpacked whenever they are needed.
"""

from __future__ import annotations

import copy

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.compression.compressed import Codes, Compressed, spread
from train_then_compress.config.parts import in_embedding

#: Weights that share a scale in torch's kernel, and what its number of outputs must be a multiple of.
_GROUPS = (256, 128, 64, 32)
_ROWS = 16


def to_packed_linears(compressed: Compressed) -> nn.Module:
    """A copy of the model in which linear layers and token embeddings with uniform 4-bit codes keep them packed."""
    model = copy.deepcopy(compressed.model)
    for name, codes in compressed.codes.items():
        path = name.removesuffix(".weight")
        module = model.get_submodule(path)
        if not isinstance(codes, Codes) or codes.bits != 4:
            continue
        if isinstance(module, nn.Embedding):
            model.set_submodule(path, PackedEmbedding(codes))
        elif type(module) is nn.Linear:  # others may do something to their inputs
            bias = None if module.bias is None else module.bias.detach()
            # A factored embedding's is also used the other way round, for which its weights are asked for.
            by_kernel = kernel_group(codes) and not in_embedding(path)
            model.set_submodule(path, Int4Linear(codes, bias) if by_kernel else PackedLinear(codes, bias))
    return model.eval()


def kernel_group(codes: Codes) -> int:
    """The largest group in which torch's kernel can take a matrix, 0 where it cannot.

    Its groups hold 32, 64, 128 or 256 weights; larger ones of ours are cut, their scale repeated.
    """
    (rows, columns), groups = codes.codes.shape, codes.scale.shape[1]
    if rows % _ROWS or columns % groups:
        return 0
    return next((group for group in _GROUPS if columns // groups % group == 0), 0)


class Int4Linear(nn.Module):
    """A linear layer by torch's int4 kernel: ``weight = (code - 8) * scale + offset``, both in bf16.

    Inputs are rounded to bf16, products summed in fp32, outputs rounded to bf16. So with u = 2^-8, weights w, codes q,
    zero points z and scales s, an output y is off by at most about
    ``u * (|y| + sum_i |x_i| (|w_i| + s_i (|q_i - 8| + |8 - z_i|)))``. Pruned weights stay exactly zero where the zero
    point is symmetric (7). The layout of the codes is the processor's: it is made here and not for storing.
    """

    codes: Tensor
    scales_and_offsets: Tensor
    bias: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None):
        super().__init__()
        rows, columns = codes.codes.shape
        self.group = kernel_group(codes)
        scale = codes.scale.float().expand(rows, -1)
        offset = (8 - codes.zero.float()) * scale
        each = torch.stack((scale, offset), dim=-1).repeat_interleave(columns // scale.shape[1] // self.group, dim=1)
        packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.codes.int(), 1)
        self.register_buffer("codes", packed)
        self.register_buffer("scales_and_offsets", each.transpose(0, 1).contiguous().bfloat16())
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs] of the same dtype."""
        flat = x.flatten(0, -2).bfloat16().contiguous()
        kernel = torch.ops.aten._weight_int4pack_mm_for_cpu
        product: Tensor = kernel(flat, self.codes, self.group, self.scales_and_offsets)
        y = product.to(x.dtype).view(*x.shape[:-1], -1)
        return y if self.bias is None else y + self.bias


class PackedMatrix(nn.Module):
    """Two codes in a byte, with their scales and zero points; rows come back as `Codes.dequantize` has them."""

    packed: Tensor
    scale: Tensor
    zero: Tensor

    def __init__(self, codes: Codes):
        super().__init__()
        self.columns = codes.codes.shape[1]
        even = F.pad(codes.codes, (0, self.columns % 2))
        one_zero = bool((codes.zero == codes.zero[0, 0]).all())
        self.register_buffer("packed", even[:, 0::2] | even[:, 1::2] << 4)
        self.register_buffer("scale", codes.scale)
        self.register_buffer("zero", codes.zero[:1, :1].clone() if one_zero else codes.zero)

    @property
    def weight(self) -> Tensor:
        """float32 [rows, columns], unpacked now."""
        return self.rows(slice(None))

    def rows(self, which: Tensor | slice) -> Tensor:
        """float32 [.., columns]."""
        packed = self.packed[which]
        codes = torch.stack((packed & 15, packed >> 4), dim=-1).flatten(-2)[..., : self.columns]
        scale, zero = (part[which] if len(part) > 1 else part[0] for part in (self.scale, self.zero))
        return (codes.float() - spread(zero.float(), self.columns)) * spread(scale.float(), self.columns)


class PackedLinear(PackedMatrix):
    """A linear layer whose weights are unpacked for each use; exact."""

    bias: Tensor | None

    def __init__(self, codes: Codes, bias: Tensor | None):
        super().__init__(codes)
        self.register_buffer("bias", bias)

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        return F.linear(x, self.weight, self.bias)


class PackedEmbedding(PackedMatrix):
    """A token embedding of which the rows asked for are unpacked; as tied output projection, all of them."""

    def forward(self, tokens: Tensor) -> Tensor:
        """int64 [...] -> float32 [..., columns]."""
        return self.rows(tokens)

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """[.., columns] -> a score for each token, [.., vocabulary]."""
        return F.linear(x, self.weight, bias)
