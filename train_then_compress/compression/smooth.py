"""SmoothQuant (Xiao et al. 2023, arXiv 2211.10438): weights and activations of 8 bits.

A few input channels of large magnitude spoil the rounding of all activations. Each channel j is divided by a scale, and
the weights that meet it are multiplied by it, ``Y = (X / s) (s W)`` (equation 3), with
``s_j = max|X_j|^alpha / max|W_j|^(1 - alpha)`` (equation 4). A LayerNorm that feeds a layer alone takes the division
over; elsewhere the layer divides its input at run time by a stored vector.

Weights are stored in 8 bits. The quantization of the activations is simulated: they are rounded to the values that int8
has, and multiplied in floating point, so that the quality is that of int8 and the speed is not. The linear layers of
encoder and decoder are quantized; heads, attention scores and attention's mixing stay in floating point.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.compression.bench import Bench
from train_then_compress.compression.calibration import linear_inputs
from train_then_compress.compression.compressed import Compressed, matrices
from train_then_compress.compression.quant import quantize
from train_then_compress.config.parts import in_embedding, in_layers
from train_then_compress.config.recipes import Step
from train_then_compress.config.steps import Quant, Smooth
from train_then_compress.models.layers import EncoderLayer

_BITS = 8
_LARGEST = 127  # codes are symmetric (section 2, equation 1)
_TINY = torch.finfo(torch.float32).tiny
#: In a pre-norm layer: the LayerNorm that feeds a linear layer and nothing else. (An encoder's last one feeds the keys
#: and values of every layer of the decoder.)
_FED_BY = {
    "attention.query_key_value": "attention_norm", "cross_attention.query": "cross_attention_norm",
    "feed_forward.inner": "feed_forward_norm",
}  # fmt: skip


class SmoothLinear(nn.Linear):
    """A linear layer whose input is divided by ``smoothing`` [inputs], if it has that, and rounded to 8 bits.

    The rounding is simulated in floating point. ``step`` [1] is the distance of two values of a static quantization;
    without it each token's follows from its own largest magnitude. ``rescaled``: the weights are those of ``s W``.
    """

    smoothing: nn.Parameter | None
    step: nn.Parameter | None

    def __init__(self, linear: nn.Linear, divides: bool, static: bool, rescaled: bool):
        super().__init__(linear.in_features, linear.out_features, linear.bias is not None, device="meta")
        self.weight, self.bias, self.rescaled = linear.weight, linear.bias, rescaled
        ones = linear.weight.detach().new_ones
        self.smoothing = nn.Parameter(ones(linear.in_features), requires_grad=False) if divides else None
        self.step = nn.Parameter(ones(1), requires_grad=False) if static else None

    def forward(self, x: Tensor) -> Tensor:
        """[..., inputs] -> [..., outputs]."""
        x = x.float()
        if self.smoothing is not None:
            x = x / self.smoothing
        return F.linear(rounded(x, dynamic_steps(x) if self.step is None else self.step), self.weight, self.bias)


def dynamic_steps(x: Tensor) -> Tensor:
    """[..., inputs] -> [..., 1]: each token's largest magnitude becomes the largest code (equation 1)."""
    return (x.abs().amax(dim=-1, keepdim=True) / _LARGEST).clamp(min=_TINY)


def rounded(x: Tensor, step: Tensor) -> Tensor:
    """The values of symmetric int8 codes nearest to ``x``, in floating point; what lies beyond them is cut off."""
    return (x / step).round().clamp(-_LARGEST, _LARGEST) * step


def apply(compressed: Compressed, step: Step, bench: Bench) -> None:
    """Calibrate, smooth, and quantize the weights to 8 bits."""
    config = step.config
    assert isinstance(config, Smooth)
    ranges = input_ranges(compressed.model, bench, config.calibration_batches)
    static, smoothed = config.activations == "static", config.alpha is not None
    compressed.change({"method": "smooth", "static": static, "smoothed": smoothed})
    weights = Quant(symmetric=True, granularity=config.granularity)
    with torch.no_grad():
        if config.alpha is not None:
            ranges = smooth(compressed.model, ranges, config.alpha)
        for name, layer in _layers(compressed.model).items():
            if isinstance(layer, SmoothLinear) and layer.step is not None and ranges[name].any():
                layer.step.copy_(_as_stored(ranges[name].max() / _LARGEST))
        for name, weight in matrices(compressed.model, config.embeddings).items():
            if in_layers(name) or in_embedding(name):
                compressed.codes[name] = codes = quantize(weight.cpu(), _BITS, weights)
                weight.copy_(codes.dequantize())
    compressed.mask_weights()


def rebuild(model: nn.Module, entry: dict[str, Any]) -> nn.Module:
    """Replace the linear layers inside layers, in place, by ones that quantize their input; nothing is scaled yet."""
    norms = norms_before(model)
    for name, linear in _layers(model).items():
        divides = entry["smoothed"] and name not in norms
        model.set_submodule(name, SmoothLinear(linear, divides, entry["static"], entry["smoothed"]))
    return model


def input_ranges(model: nn.Module, bench: Bench, batches: int) -> dict[str, Tensor]:
    """By the layer's name, the largest magnitude of each input channel on so many training batches: [inputs].

    Zeros for a layer that nothing came to.
    """
    ranges = {name: layer.weight.new_zeros(layer.in_features) for name, layer in _layers(model).items()}

    def widen(name: str, inputs: Tensor) -> None:
        layer = name.removesuffix(".weight")
        if layer in ranges and len(inputs):
            ranges[layer] = torch.maximum(ranges[layer], inputs.abs().amax(dim=0))

    linear_inputs(model, bench.task, bench.calibration(batches), widen)
    return ranges


def smooth(model: nn.Module, ranges: dict[str, Tensor], alpha: float) -> dict[str, Tensor]:
    """Move magnitude from inputs to weights, in place: but for rounding the model computes what it did.

    ``ranges`` are those of `input_ranges`; returns those of the smoothed inputs.
    """
    norms = norms_before(model)
    smoothed = {}
    with torch.no_grad():
        for name, layer in _layers(model).items():
            assert isinstance(layer, SmoothLinear)
            scales = smoothing_scales(ranges[name], layer.weight, alpha)
            smoothed[name] = ranges[name] / scales
            layer.weight.mul_(scales)
            if layer.smoothing is not None:
                layer.smoothing.copy_(scales)
            else:
                norms[name].weight.div_(scales)
                norms[name].bias.div_(scales)
    return smoothed


def smoothing_scales(inputs: Tensor, weight: Tensor, alpha: float) -> Tensor:
    """Equation 4: the largest magnitudes of each input [inputs] and ``weight`` [outputs, inputs] -> [inputs].

    As the packed file stores them, in bf16; 1 for a channel that is always zero or meets only zeros.
    """
    largest = weight.abs().amax(dim=0)
    scales = _as_stored(inputs**alpha / largest ** (1 - alpha))
    return torch.where((inputs > 0) & (largest > 0), scales, 1.0)


def norms_before(model: nn.Module) -> dict[str, nn.LayerNorm]:
    """By a linear layer's name, the LayerNorm that feeds this layer and nothing else: those of pre-norm layers.

    (A post-norm layer's output goes to the residual connection too.)
    """
    norms = {}
    for name, layer in model.named_modules():
        if isinstance(layer, EncoderLayer) and layer.pre_norm:
            for linear, norm in _FED_BY.items():
                if isinstance(module := getattr(layer, norm, None), nn.LayerNorm):
                    norms[f"{name}.{linear}"] = module
    return norms


def _layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers inside the layers of encoder and decoder, by name."""
    return {
        name: module for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and in_layers(name)
    }  # fmt: skip


def _as_stored(values: Tensor) -> Tensor:
    """Rounded to bf16, in which a packed file holds what is not quantized."""
    return values.bfloat16().float()
