"""Early exit: a classifier with heads on inner layers too, at which an example leaves once it is sure.

DeeBERT (Xin et al. 2020, section 3); BranchyNet (Teerapittayanon et al. 2016, section III). Both ask for a small
entropy; here it is a large probability, so that the threshold reads as a confidence.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from train_then_compress.config import RobertaConfig
from train_then_compress.models.dropout import Dropout
from train_then_compress.models.roberta import Classifier


class ExitHead(nn.Module):
    """The form of RoBERTa's classification head; pre-norm adds the normalization that stands after the last layer."""

    def __init__(self, config: RobertaConfig, labels: int):
        super().__init__()
        self.norm = nn.LayerNorm(config.width) if config.norm == "pre" else nn.Identity()
        self.dropout = Dropout(config.dropout)
        self.head = nn.Linear(config.width, config.width)
        self.projection = nn.Linear(config.width, labels)

    def initialize(self, generator: torch.Generator) -> None:
        """Normal weights of the deviation that the trunk began with (`models.roberta.initialize`), drawn on the CPU."""
        for linear in (self.head, self.projection):
            deviation = min(0.05, 1 / math.sqrt(linear.in_features))
            with torch.no_grad():
                linear.weight.copy_(deviation * torch.randn(linear.weight.shape, generator=generator))
                linear.bias.zero_()

    def forward(self, first: Tensor) -> Tensor:
        """The states of ``<s>`` after a layer [batch, width] -> logits [batch, labels]."""
        return self.projection(self.dropout(torch.tanh(self.head(self.dropout(self.norm(first))))))


class EarlyExitClassifier(Classifier):
    """A classifier's own modules under their own names, and heads ``exits.<layers passed>`` after every so many layers.

    In training mode or with gradients every exit gives logits. Otherwise an example leaves at the first exit whose
    largest softmax probability is at least ``threshold``, at the latest after the last layer.
    """

    def __init__(self, trunk: Classifier, every: int, threshold: float):
        nn.Module.__init__(self)  # the parts are the trunk's
        self.config, self.threshold = trunk.config, threshold
        for name, part in trunk.named_children():
            self.add_module(name, part)
        device = next(trunk.parameters()).device
        with torch.no_grad():
            labels = trunk.predict(torch.zeros(1, trunk.config.width, device=device)).shape[1]
        inner = range(every, len(trunk.encoder.layers), every)
        self.exits = nn.ModuleDict({str(depth): ExitHead(trunk.config, labels) for depth in inner}).to(device)
        self.train(trunk.training)

    def forward(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """``tokens`` int64 [batch, length] -> logits [batch, labels] or of every exit, [exits, batch, labels]."""
        if self.training or torch.is_grad_enabled():
            return self.every_exit(tokens, padded)
        return self.leave(tokens, padded)[0]

    def every_exit(self, tokens: Tensor, padded: bool = True) -> Tensor:
        """Logits [exits, batch, labels], the trunk's own last."""
        x, bias, rotation = self.encoder.embed(tokens, padded)
        logits = []
        for depth, layer in enumerate(self.encoder.layers, 1):
            x = layer(x, bias, rotation)
            if str(depth) in self.exits:
                logits.append(self.exits[str(depth)](x[:, 0]))
        return torch.stack([*logits, self.predict(self.encoder.final_norm(x)[:, 0])])

    def leave(self, tokens: Tensor, padded: bool = True) -> tuple[Tensor, Tensor]:
        """Logits [batch, labels], and int64 [batch], the layers that each example passed; later ones never see it."""
        x, bias, rotation = self.encoder.embed(tokens, padded)
        staying = torch.arange(len(tokens), device=tokens.device)
        depths = torch.full_like(staying, len(self.encoder.layers))
        logits: list[Tensor] = []
        order: list[Tensor] = []
        for depth, layer in enumerate(self.encoder.layers, 1):
            x = layer(x, bias, rotation)
            if str(depth) not in self.exits:
                continue
            here = self.exits[str(depth)](x[:, 0])
            sure = here.float().softmax(dim=-1).amax(dim=-1) >= self.threshold
            logits.append(here[sure])
            order.append(staying[sure])
            depths[staying[sure]] = depth
            x, staying, bias = x[~sure], staying[~sure], None if bias is None else bias[~sure]
            if not len(staying):
                break
        else:
            logits.append(self.predict(self.encoder.final_norm(x)[:, 0]))
            order.append(staying)
        return torch.cat(logits)[torch.cat(order).argsort()], depths


@contextmanager
def nobody_leaves(model: nn.Module) -> Iterator[None]:
    """Every example passes every layer and every exit, in evaluation too: calibration looks at all of them."""
    if not isinstance(model, EarlyExitClassifier):
        yield
        return
    threshold, model.threshold = model.threshold, math.inf
    try:
        yield
    finally:
        model.threshold = threshold
