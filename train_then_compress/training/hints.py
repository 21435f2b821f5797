"""What a student may learn from inside its teacher: hidden states, or relations of queries, keys and values.

A hint is a loss for each sequence, the mean over its tokens (padding left out), summed over the layers compared.
Student and teacher may differ in depth and width. The layers of a decoder learn from those of the teacher's decoder, at
the tokens of the target.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from train_then_compress.config import Teaching
from train_then_compress.config.parts import SIDES, in_embedding, reads_target
from train_then_compress.training.task import text_at, tokens_at

STUDENT, TEACHER = 0, 1
#: By name, what a module was given first and what it gave.
Seen = Mapping[str, tuple[Tensor, Tensor]]
#: The logarithm of what a relation to padding is: its exponential is zero, and differences of two stay finite.
_NEVER = -1e4
#: MiniLMv2 splits the 768 (1024) units of its teachers into 48 (64) relation heads.
_RELATION_HEAD_SIZE = 16


@contextmanager
def states_of(modules: Mapping[str, nn.Module]) -> Iterator[dict[str, tuple[Tensor, Tensor]]]:
    """What modules are given and give while the context is open, last, by the names that they have here."""
    seen: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(name: str, module: nn.Module, arguments: tuple[Any, ...], output: Tensor) -> None:
        seen[name] = arguments[0], output

    hooks = [module.register_forward_hook(partial(keep, name)) for name, module in modules.items()]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


def depths_of(model: nn.Module) -> dict[str, int]:
    """The layers that an encoder and perhaps a decoder have, whatever pruning has left of them."""
    return {
        stack: len(list(module.get_submodule("layers").children())) for stack, module in model.named_children()
        if stack in SIDES
    }  # fmt: skip


def layer_pairs(student: int, teacher: int, layer_map: str) -> list[tuple[int, int]]:
    """Which layer, counted from 0, learns from which, for two depths (see `config.Teaching`)."""
    if layer_map == "last":
        return [(student - 1, teacher - 1)]
    return [(layer, max(0, round((layer + 1) * teacher / student) - 1)) for layer in range(student)]


def mean_over_tokens(values: Tensor, real: Tensor) -> Tensor:
    """[sequences, length] -> [sequences]: the mean where ``real``."""
    return (values * real).sum(dim=1) / real.sum(dim=1)


class Hints:
    """No hints, and the form of the others: which modules of both models are watched, and where they should agree."""

    def __init__(self, student: nn.Module, teacher: nn.Module, teaching: Teaching):
        theirs = depths_of(teacher)
        #: By name, layers of the student and what they learn from.
        self.pairs = [
            (f"{stack}.layers.{mine}", f"{stack}.layers.{its}") for stack, depth in depths_of(student).items()
            for mine, its in layer_pairs(depth, theirs[stack], teaching.layer_map)
        ]  # fmt: skip

    def watched(self, model: nn.Module, side: int) -> dict[str, nn.Module]:
        """The modules to be watched, under the same names on both sides (`STUDENT`, `TEACHER`): the student's."""
        return {}

    def projections(self, seed: int) -> dict[str, Tensor]:
        """Initial values of the matrices that are learned with the student."""
        return {}

    def flops(self, batch: Any) -> float:
        """What the comparison adds to a training step on a batch."""
        return 0.0

    def losses(self, student: Seen, teacher: Seen, part: Any, projections: nn.ParameterDict) -> Tensor:
        """[sequences] of a piece of a batch, from what the watched modules were given and gave."""
        return torch.zeros(len(part.tokens), device=part.tokens.device)


class HiddenHints(Hints):
    """Mean squared error of hidden states and of the embedding output (TinyBERT, Jiao et al. 2020, section 3.1).

    Where widths differ, the student's pass through a learned matrix: one for all layers and one for the embedding.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, teaching: Teaching):
        super().__init__(student, teacher, teaching)
        shapes: list[Any] = [student.config, teacher.config]
        self.widths = [shape.width for shape in shapes]
        # The embedding output (after its dropout) is what a first layer is given.
        self.compared = {f"{stack}.embedding": (f"{stack}.layers.0",) * 2 for stack in depths_of(student)}
        self.compared |= {pair[STUDENT]: pair for pair in self.pairs}

    def watched(self, model: nn.Module, side: int) -> dict[str, nn.Module]:
        """Layers, first ones also for the embedding."""
        return {name: model.get_submodule(pair[side]) for name, pair in self.compared.items()}

    def projections(self, seed: int) -> dict[str, Tensor]:
        """float32 [teacher's width, student's width] each, or none."""
        inputs, outputs = self.widths
        if inputs == outputs:
            return {}
        generator = torch.Generator().manual_seed(seed)
        drawn = torch.randn(2, outputs, inputs, generator=generator) / math.sqrt(inputs)
        return {"embedding": drawn[0].clone(), "hidden": drawn[1].clone()}

    def flops(self, batch: Any) -> float:
        """The projections, forward and backward."""
        inputs, outputs = self.widths
        positions = sum(math.prod(tokens_at(batch, name).shape) for name in self.compared)
        return 0.0 if inputs == outputs else 3 * 2.0 * inputs * outputs * positions

    def losses(self, student: Seen, teacher: Seen, part: Any, projections: nn.ParameterDict) -> Tensor:
        """As said by the class; the mean over units, too."""
        total = super().losses(student, teacher, part, projections)
        for name in student:
            which, matrix = (0, "embedding") if in_embedding(name) else (1, "hidden")
            states, aims = student[name][which].float(), teacher[name][which].float()
            if projections:
                states = F.linear(states, projections[matrix])
            total = total + mean_over_tokens((states - aims).square().mean(dim=2), text_at(part, name))
        return total


class RelationHints(Hints):
    """KL divergence of self-attention relations (MiniLMv2, Wang et al. 2021, section 3).

    A token's relation to the others (in a decoder, to those before it and itself) is the softmax of the scaled products
    of its query with theirs, of its key, of its value. Heads are joined and split anew into as many relation heads as
    both widths allow, up to one for 16 units of the teacher. Queries and keys are those of the projection: rotary
    positions come later.
    """

    def __init__(self, student: nn.Module, teacher: nn.Module, teaching: Teaching):
        super().__init__(student, teacher, teaching)
        self.widths = [(_attention_width(student, mine), _attention_width(teacher, its)) for mine, its in self.pairs]

    def watched(self, model: nn.Module, side: int) -> dict[str, nn.Module]:
        """Projections to queries, keys and values."""
        return {pair[STUDENT]: model.get_submodule(f"{pair[side]}.attention.query_key_value") for pair in self.pairs}

    def flops(self, batch: Any) -> float:
        """Products of all pairs of positions: of the student forward and backward, of the teacher forward."""
        total = 0.0
        for (name, _), (student, teacher) in zip(self.pairs, self.widths, strict=True):
            sequences, length = tokens_at(batch, name).shape
            total += 3 * 2.0 * sequences * length**2 * (3 * student + teacher)
        return total

    def losses(self, student: Seen, teacher: Seen, part: Any, projections: nn.ParameterDict) -> Tensor:
        """As said by the class: the mean over relation heads, the sum over queries, keys and values."""
        total = super().losses(student, teacher, part, projections)
        for (name, _), widths in zip(self.pairs, self.widths, strict=True):
            heads, real = relation_heads(*widths), text_at(part, name)
            related = real[:, None, :].expand(-1, real.shape[1], -1)
            if reads_target(name):
                related = related.tril()
            for mine, its in zip(student[name][1].chunk(3, dim=2), teacher[name][1].chunk(3, dim=2), strict=True):
                ours, theirs = log_relations(mine, heads, related), log_relations(its, heads, related)
                divergence = (theirs.exp() * (theirs - ours)).sum(dim=3).mean(dim=1)
                total = total + mean_over_tokens(divergence, real)
        return total


def _attention_width(model: nn.Module, layer: str) -> int:
    """The units of a layer's queries, fewer than the model's where heads were pruned."""
    attention: Any = model.get_submodule(f"{layer}.attention")
    return int(attention.heads * attention.head_size)


def relation_heads(student: int, teacher: int) -> int:
    """The largest number of relation heads for two attention widths."""
    most = max(1, teacher // _RELATION_HEAD_SIZE)
    return max(heads for heads in range(1, most + 1) if student % heads == 0 == teacher % heads)


def log_relations(vectors: Tensor, heads: int, related: Tensor) -> Tensor:
    """[sequences, length, units] -> logarithms of relations [sequences, heads, length, length]; ``related``: bool
    [sequences, length, length], false where there is none."""
    sequences, length, units = vectors.shape
    split = vectors.float().reshape(sequences, length, heads, units // heads).transpose(1, 2)
    scores = split @ split.transpose(2, 3) / math.sqrt(units // heads)
    return scores.masked_fill(~related[:, None], _NEVER).log_softmax(dim=3)


HINTS: dict[str, type[Hints]] = {"none": Hints, "hidden": HiddenHints, "relations": RelationHints}
