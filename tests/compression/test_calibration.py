"""What calibration sees, against a forward pass written out by hand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from train_then_compress.compression.calibration import linear_inputs, second_moments
from train_then_compress.data.prepare import PAD
from train_then_compress.tasks import RunTask

TASKS = ["mlm", "classification", "translation"]


def small_task(build_task: Callable[..., RunTask], name: str) -> RunTask:
    model = {"dropout": 0.2, "positions": "learned"} | ({"length": 64} if name == "translation" else {})
    return build_task(name, model=model)


def new_model(task: RunTask) -> nn.Module:
    """In training mode, nothing at its initial zero or one."""
    model = task.new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.05 * torch.randn_like(parameter))
    return model.train()


def linear(layer: nn.Linear, x: Tensor) -> Tensor:
    return x @ layer.weight.T + layer.bias


def attend(queries: Tensor, keys: Tensor, values: Tensor, heads: int, bias: Tensor) -> Tensor:
    """All [batch, length, width]; ``bias`` onto the scores, [batch or 1, 1, queries or 1, keys]."""
    query, key, value = (part.reshape(*part.shape[:2], heads, -1).transpose(1, 2) for part in (queries, keys, values))
    scores = query @ key.transpose(2, 3) / query.shape[3] ** 0.5 + bias
    return (scores.softmax(dim=3) @ value).transpose(1, 2).reshape(queries.shape)


def layer_by_hand(layer: Any, x: Tensor, bias: Tensor, source: tuple[Tensor, Tensor] | None = None) -> Iterator[Any]:
    """The names and inputs of the linear layers in a pre-norm layer, then what it gives; ``source``: encoded, and the
    bias of attention to it."""
    attention, feed_forward = layer.attention, layer.feed_forward
    normed = layer.attention_norm(x)
    yield "attention.query_key_value", normed
    mixed = attend(*linear(attention.query_key_value, normed).chunk(3, dim=2), attention.heads, bias)
    yield "attention.output", mixed
    x = x + linear(attention.output, mixed)
    if source is not None:
        encoded, source_bias = source
        cross, normed = layer.cross_attention, layer.cross_attention_norm(x)
        yield "cross_attention.query", normed
        yield "cross_attention.key_value", encoded
        keys, values = linear(cross.key_value, encoded).chunk(2, dim=2)
        mixed = attend(linear(cross.query, normed), keys, values, cross.heads, source_bias)
        yield "cross_attention.output", mixed
        x = x + linear(cross.output, mixed)
    normed = layer.feed_forward_norm(x)
    yield "feed_forward.inner", normed
    inner = feed_forward.activation(linear(feed_forward.inner, normed))
    yield "feed_forward.outer", inner
    yield "", x + linear(feed_forward.outer, inner)


def stack_by_hand(
    layers: nn.Module, x: Tensor, bias: Tensor, source: tuple[Tensor, Tensor] | None = None
) -> tuple[dict[str, Tensor], Tensor]:
    """The inputs of each linear layer, by number and name, and what the last layer gives."""
    seen: dict[str, Tensor] = {}
    for number, layer in enumerate(layers.children()):
        found = dict(layer_by_hand(layer, x, bias, source))
        x = found.pop("")
        seen |= {f"{number}.{name}.weight": inputs for name, inputs in found.items()}
    return seen, x


def hidden_from(tokens: Tensor) -> Tensor:
    return torch.where(tokens == PAD, -torch.inf, 0.0)[:, None, None, :]


def rows_by_hand(model: Any, part: Any) -> dict[str, Tensor]:
    """What each linear layer is given, [rows, inputs], padding removed; learned positions."""
    if not hasattr(model, "decoder"):
        encoder, tokens = model.encoder, part.tokens
        x = encoder.embedding_norm(encoder.embedding.weight[tokens] + encoder.positions[: tokens.shape[1]])
        seen, x = stack_by_hand(encoder.layers, x, hidden_from(tokens))
        rows = {f"encoder.layers.{name}": inputs[tokens != PAD] for name, inputs in seen.items()}
        hidden = encoder.final_norm(x)
        if hasattr(part, "where"):
            return rows | {"head.weight": hidden.reshape(-1, hidden.shape[2])[part.where[: part.terms]]}
        return rows | {"head.weight": hidden[:, 0], "projection.weight": torch.tanh(linear(model.head, hidden[:, 0]))}
    x, y = (
        model.embedding.weight[tokens] * model.config.width**0.5 + table[: tokens.shape[1]]
        for tokens, table in ((part.source, model.source_positions), (part.target, model.target_positions))
    )
    seen, x = stack_by_hand(model.encoder.layers, x, hidden_from(part.source))
    rows = {f"encoder.layers.{name}": inputs[part.source != PAD] for name, inputs in seen.items()}
    future = torch.full((y.shape[1], y.shape[1]), -torch.inf).triu(1)[None, None]
    source = model.encoder.final_norm(x), hidden_from(part.source)
    seen, _ = stack_by_hand(model.decoder.layers, y, future, source)
    return rows | {
        f"decoder.layers.{name}": inputs[(part.source if name.split(".")[2] == "key_value" else part.target) != PAD]
        for name, inputs in seen.items()
    }


def inputs_by_hand(model: nn.Module, parts: list) -> dict[str, Tensor]:
    """[rows, inputs] for every linear layer, over all pieces."""
    with torch.no_grad():
        found = [rows_by_hand(model, part) for part in parts]
    return {name: torch.cat([rows[name] for rows in found]) for name in found[0]}


def parts_of(task: RunTask) -> list:
    """Two batches in pieces, padding among them, and for the masked LM places that only fill up."""
    parts = [part for step in (0, 1) for part in task.parts(task.batch(step), 0, 1, 4)]
    assert len(parts) >= 4 and any((part.tokens == PAD).any() for part in parts)
    where = [part for part in parts if hasattr(part, "where")]
    assert not where or any(part.terms < len(part.where) for part in where)
    return parts


@pytest.mark.parametrize("name", TASKS)
def test_inputs_are_those_of_a_forward_pass_by_hand(name: str, build_task: Callable[..., RunTask]) -> None:
    task = small_task(build_task, name)
    model, parts = new_model(task), parts_of(task)
    expected = inputs_by_hand(model.eval(), parts)
    model.train()
    seen: dict[str, list[Tensor]] = {}
    linear_inputs(model, task, parts, lambda name, inputs: seen.setdefault(name, []).append(inputs))
    linear = {f"{name}.weight" for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    assert seen.keys() == expected.keys() == linear
    for name, pieces in seen.items():
        inputs = torch.cat(pieces)
        assert inputs.dtype == torch.float32 and inputs.shape == expected[name].shape
        torch.testing.assert_close(inputs, expected[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", TASKS)
def test_second_moments_are_numpys(name: str, build_task: Callable[..., RunTask]) -> None:
    task = small_task(build_task, name)
    model, parts = new_model(task), parts_of(task)
    model.never_used = nn.Linear(32, 3)
    moments = second_moments(model, task, parts)
    expected = inputs_by_hand(model.eval(), parts)
    assert moments.keys() == expected.keys()
    for name, moment in moments.items():
        inputs = expected[name].double().numpy()
        mean = np.mean([np.outer(row, row) for row in inputs], axis=0)
        assert moment.dtype == torch.float64
        np.testing.assert_allclose(moment.numpy(), mean, rtol=1e-4, atol=1e-5 * np.abs(mean).max())
    some = {list(moments)[-1], "encoder.layers.0.feed_forward.outer.weight"}
    fewer = second_moments(model, task, parts, some)
    assert fewer.keys() == some and all(torch.equal(fewer[name], moments[name]) for name in some)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_the_model_is_left_as_it_was_even_after_an_error(
    fails: bool, training: bool, build_task: Callable[..., RunTask]
) -> None:
    task = build_task("mlm", model={"dropout": 0.2})
    model = new_model(task).train(training)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    visited = []

    def visit(name: str, inputs: Tensor) -> None:
        visited.append(name)
        if fails and len(visited) == 3:
            raise RuntimeError("enough")

    if fails:
        with pytest.raises(RuntimeError, match="enough"):
            linear_inputs(model, task, parts_of(task), visit)
    else:
        linear_inputs(model, task, parts_of(task), visit)
    assert len(visited) >= 3
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    assert all(module.training == training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())
