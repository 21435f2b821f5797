"""Hints against loops over layers, heads and tokens, for students of any depth and width."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from train_then_compress.config import RobertaConfig, Teaching, TransformerConfig
from train_then_compress.data.prepare import PAD
from train_then_compress.models.roberta import MaskedLM
from train_then_compress.models.transformer import Translator
from train_then_compress.training.hints import (
    HINTS,
    STUDENT,
    TEACHER,
    Hints,
    layer_pairs,
    mean_over_tokens,
    relation_heads,
    states_of,
)

#: Of the sequences; of a translation, its sources. Its targets are as long the other way round.
LENGTHS = [7, 4]
KINDS = ["mlm", "translation"]


def model_of(depth: int, width: int, seed: int, kind: str = "mlm", **changes: Any) -> Any:
    """A translator's decoder has a layer more than its encoder."""
    torch.manual_seed(seed)
    shape: dict[str, Any] = {"depth": depth, "width": width, "head_size": 16, "dropout": 0.0} | changes
    model: MaskedLM | Translator
    if kind == "mlm":
        model = MaskedLM(RobertaConfig(**shape), 60, 12)
    else:
        model = Translator(TransformerConfig(decoder_depth=depth + 1, **shape), 60, 12)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def tokens_of(lengths: list[int]) -> Tensor:
    tokens = torch.randint(5, 60, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(0))
    for row, length in zip(tokens, lengths, strict=True):
        row[length:] = PAD
    return tokens


PART = SimpleNamespace(tokens=tokens_of(LENGTHS), target=tokens_of(LENGTHS[::-1]))


def run(model: Any) -> None:
    model(*((PART.tokens, PART.target) if isinstance(model, Translator) else (PART.tokens,)), torch.arange(3))


def lengths_of(stack: str) -> list[int]:
    return LENGTHS if stack == "encoder" else LENGTHS[::-1]


def losses(hints: Hints, student: nn.Module, teacher: nn.Module, projections: nn.ParameterDict) -> Tensor:
    with states_of(hints.watched(student, STUDENT)) as mine:
        run(student)
    with states_of(hints.watched(teacher, TEACHER)) as its, torch.no_grad():
        run(teacher)
    return hints.losses(mine, its, PART, projections)


def states(model: Any) -> dict[str, list[np.ndarray]]:
    """By stack, the embedding output and what each layer gives, computed step by step."""
    found: dict[str, list[np.ndarray]] = {}
    with torch.no_grad():
        if isinstance(model, MaskedLM):
            stacks: Any = [("encoder", model.encoder, model.encoder.embed(PART.tokens))]
        else:
            tables = (model.source_positions, model.target_positions)
            x, y = (
                model.embedding.weight[tokens] * model.config.width**0.5 + table[: tokens.shape[1]]
                for tokens, table in zip((PART.tokens, PART.target), tables, strict=True)
            )
            encoded, bias = model.encode(PART.tokens)
            length = PART.target.shape[1]
            future = torch.full((length, length), -torch.inf).triu(1)
            stacks = [("encoder", model.encoder, (x, bias, None)), ("decoder", model.decoder, (y, future, None))]
        for name, stack, (x, bias, rotation) in stacks:
            found[name] = [x.double().numpy()]
            for layer in stack.layers:
                cross = ()
                if name == "decoder":
                    cross = ((*layer.cross_attention.remember(encoded), hidden_from(PART.tokens)),)
                x = layer(x, bias, rotation, *cross)
                found[name].append(x.double().numpy())
    return found


def hidden_from(tokens: Tensor) -> Tensor:
    return torch.where(tokens == PAD, -torch.inf, 0.0)[:, None, None, :]


@given(st.integers(1, 48), st.integers(1, 48))
def test_layers_are_paired_in_order_and_the_last_with_the_last(student: int, teacher: int) -> None:
    pairs = layer_pairs(student, teacher, "uniform")
    assert [mine for mine, _ in pairs] == list(range(student))
    its = [theirs for _, theirs in pairs]
    assert its == sorted(its) and its[0] >= 0 and its[-1] == teacher - 1
    assert layer_pairs(student, teacher, "last") == pairs[-1:]


def test_a_layer_learns_from_the_one_as_far_up() -> None:
    assert layer_pairs(2, 4, "uniform") == [(0, 1), (1, 3)]
    assert layer_pairs(4, 12, "uniform") == [(0, 2), (1, 5), (2, 8), (3, 11)]
    assert layer_pairs(4, 2, "uniform") == [(0, 0), (1, 0), (2, 1), (3, 1)]
    assert layer_pairs(3, 3, "uniform") == [(0, 0), (1, 1), (2, 2)]


def test_relation_heads_are_those_of_the_paper() -> None:
    """48 for teachers of width 768, 64 for 1024; otherwise what divides both widths."""
    assert relation_heads(384, 768) == 48 and relation_heads(384, 1024) == 64
    assert relation_heads(312, 768) == 24 and relation_heads(32, 48) == 2 and relation_heads(7, 8) == 1


def test_no_hints_are_zero() -> None:
    student, teacher = model_of(1, 32, 0), model_of(2, 48, 1)
    hints = HINTS["none"](student, teacher, Teaching())
    assert losses(hints, student, teacher, nn.ParameterDict()).tolist() == [0, 0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("layer_map", ["uniform", "last"])
@pytest.mark.parametrize("shapes", [((2, 32), (4, 48)), ((2, 32), (2, 32)), ((3, 48), (2, 32))], ids=str)
@pytest.mark.parametrize("norm", ["pre", "post"])
def test_hidden_hints_are_squared_errors_at_each_token(shapes: Any, layer_map: str, norm: str, kind: str) -> None:
    student, teacher = (model_of(*shapes[seed], seed, kind, norm=norm) for seed in (0, 1))
    hints = HINTS["hidden"](student, teacher, Teaching(hints="hidden", layer_map=layer_map))  # type: ignore[arg-type]
    projections = nn.ParameterDict(hints.projections(0))
    assert set(projections) == (set() if shapes[0][1] == shapes[1][1] else {"embedding", "hidden"})
    mine, its = states(student), states(teacher)
    carried = {name: np.eye(shapes[0][1]) for name in ("embedding", "hidden")}
    carried |= {name: matrix.detach().double().numpy() for name, matrix in projections.items()}
    expected = np.zeros(len(LENGTHS))
    for stack in mine:
        pairs = layer_pairs(len(mine[stack]) - 1, len(its[stack]) - 1, layer_map)
        compared = [(0, 0, carried["embedding"]), *((s + 1, t + 1, carried["hidden"]) for s, t in pairs)]
        for row, length in enumerate(lengths_of(stack)):
            errors = [np.mean((matrix @ mine[stack][s][row, place] - its[stack][t][row, place]) ** 2)
                      for s, t, matrix in compared for place in range(length)]  # fmt: skip
            expected[row] += sum(errors) / length
    found = losses(hints, student, teacher, projections)
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-5)
    if projections:
        found.sum().backward()
        assert all(matrix.grad is not None and matrix.grad.abs().max() > 0 for matrix in projections.values())


def softmax(scores: np.ndarray) -> np.ndarray:
    powers: np.ndarray = np.exp(scores - scores.max())
    return powers / powers.sum()


@pytest.mark.parametrize("layer_map", ["uniform", "last"])
@pytest.mark.parametrize("shapes", [((2, 32), (4, 48)), ((1, 32), (1, 32))], ids=str)
@pytest.mark.parametrize("kind, positions", [("mlm", "learned"), ("mlm", "rotary"), ("translation", "learned")])
def test_relation_hints_are_divergences_of_each_tokens_relations(
    shapes: Any, layer_map: str, kind: str, positions: str
) -> None:
    """In a decoder, of its relations to the tokens up to itself."""
    student, teacher = (model_of(*shapes[seed], seed, kind, positions=positions) for seed in (0, 1))
    teaching = Teaching(hints="relations", layer_map=layer_map)  # type: ignore[arg-type]
    hints = HINTS["relations"](student, teacher, teaching)
    assert hints.projections(0) == {}
    heads = {(32, 48): 2, (32, 32): 2}[shapes[0][1], shapes[1][1]]

    def vectors(model: Any, stack: str, layer: int) -> np.ndarray:
        """[kinds, sequences, length, heads, units]"""
        block = getattr(model, stack).layers[layer]
        before = torch.from_numpy(states(model)[stack][layer]).float()
        with torch.no_grad():
            projected = block.attention.query_key_value(block.attention_norm(before)).double().numpy()
        parts = np.split(projected, 3, axis=-1)
        return np.stack([part.reshape(*part.shape[:2], heads, -1) for part in parts])

    expected = np.zeros(len(LENGTHS))
    compared = {stack: layer_pairs(len(found) - 1, len(states(teacher)[stack]) - 1, layer_map)
                for stack, found in states(student).items()}  # fmt: skip
    for stack, mine, its in [(stack, *pair) for stack, pairs in compared.items() for pair in pairs]:
        ours, theirs = vectors(student, stack, mine), vectors(teacher, stack, its)
        for row, length in enumerate(lengths_of(stack)):
            for which, head, place in np.ndindex(3, heads, length):
                end = place + 1 if stack == "decoder" else length
                q, p = (
                    softmax(v[which, row, :end, head] @ v[which, row, place, head] / math.sqrt(v.shape[-1]))
                    for v in (ours, theirs)
                )
                expected[row] += float((p * np.log(p / q)).sum()) / heads / length
    found = losses(hints, student, teacher, nn.ParameterDict())
    assert found.tolist() == pytest.approx(expected.tolist(), rel=1e-4) and expected.min() > 1e-4
    found.sum().backward()
    for parameter in student.encoder.layers[-1].attention.query_key_value.parameters():
        assert parameter.grad is not None and parameter.grad.isfinite().all()


def test_relations_follow_a_student_whose_heads_were_pruned() -> None:
    student, teacher = model_of(1, 64, 0), model_of(1, 64, 1)
    attention = student.encoder.layers[0].attention
    attention.heads = 3
    attention.query_key_value, attention.output = nn.Linear(64, 3 * 48), nn.Linear(48, 64)
    hints = HINTS["relations"](student, teacher, Teaching(hints="relations"))
    assert (losses(hints, student, teacher, nn.ParameterDict()) > 0).all()


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hint", ["hidden", "relations"])
def test_a_model_agrees_with_itself(hint: str, kind: str) -> None:
    model = model_of(2, 32, 0, kind)
    hints = HINTS[hint](model, model, Teaching(hints=hint))  # type: ignore[arg-type]
    assert losses(hints, model, model, nn.ParameterDict()).abs().max() < 1e-6


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("hint", ["none", "hidden", "relations"])
def test_flops_are_those_of_torchs_counter(hint: str, kind: str) -> None:
    student, teacher = model_of(2, 32, 0, kind), model_of(4, 48, 1, kind)
    hints = HINTS[hint](student, teacher, Teaching(hints=hint))  # type: ignore[arg-type]
    projections = nn.ParameterDict(hints.projections(0))
    with states_of(hints.watched(student, STUDENT)) as mine:
        run(student)
    with states_of(hints.watched(teacher, TEACHER)) as its, torch.no_grad():
        run(teacher)
    apart = {name: tuple(state.detach().requires_grad_() for state in both) for name, both in mine.items()}
    with FlopCounterMode(display=False) as counter:
        total = hints.losses(apart, its, PART, projections).sum()  # type: ignore[arg-type]
        if total.requires_grad:
            total.backward()
    assert hints.flops(PART) == counter.get_total_flops()


def test_the_mean_leaves_padding_out() -> None:
    values = torch.tensor([[1.0, 2.0, 50.0], [3.0, 4.0, 5.0]])
    real = torch.tensor([[True, True, False], [True, True, True]])
    assert mean_over_tokens(values, real).tolist() == [1.5, 4.0]
