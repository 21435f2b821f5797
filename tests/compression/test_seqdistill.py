"""Sequence-level distillation: what the teacher says, decoded once and resumed, and what a student makes of it."""

from __future__ import annotations

import dataclasses
import io
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from train_then_compress.cell import locate
from train_then_compress.compression import seqdistill
from train_then_compress.compression.compressed import matrices
from train_then_compress.config import Config, ConfigError
from train_then_compress.config.steps import SeqDistill
from train_then_compress.cost.flops import forward_flops
from train_then_compress.data.pairs import PairSplit
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD
from train_then_compress.evaluation.decoding import Decoding, beam_search
from train_then_compress.evaluation.translation import decode_lines
from train_then_compress.records import Damaged
from train_then_compress.run import Run
from train_then_compress.training import interrupt

SENTENCES = 10


@pytest.fixture
def teaching(stand: Callable[..., Any]) -> Callable[..., Any]:
    """A function that makes a `Stand` of a recipe with the step, whose dense model has notions of its own."""

    def make(recipe: str = "seqdistill", directory: str = "run", beam: int = 2, steps: int = 4, **others: Any) -> Any:
        settings = {"sentences": SENTENCES, "beam": beam, "steps": steps, "lr_factor": 1.0}
        place = stand(recipe, "translation", directory, seqdistill=settings, **others)
        with torch.no_grad():
            for number, parameter in enumerate(place.model.parameters()):
                noise = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(number))
                parameter.add_(0.1 * noise)
        return place

    return make


def said_by_teacher(place: Any) -> PairSplit:
    (key, *_) = [key for key in place.stages if key.name == "seqdistill"]
    return seqdistill.translations(dataclasses.replace(place.bench, key=key), key.step.config)


def sides_of(pairs: PairSplit) -> list[tuple[list[int], list[int]]]:
    return [tuple(side.tolist() for side in pairs.sides(number)) for number in range(len(pairs))]  # type: ignore[misc]


def greedy(model: Any, source: list[int]) -> list[int]:
    """Token after token, everything computed anew for each."""
    given, said = torch.tensor([[*source, EOS]]), list[int]()
    while len(said) < int(1.5 * given.shape[1] + 10):
        logits = model(given, torch.tensor([[EOS, *said]]), torch.tensor([len(said)]))[0]
        logits[[BOS, PAD, MASK] if said else [BOS, PAD, MASK, EOS]] = -torch.inf
        if int(logits.argmax()) == EOS:
            break
        said.append(int(logits.argmax()))
    return said


@pytest.mark.parametrize("beam", [1, 3])
def test_targets_are_the_teachers_translations_of_the_first_training_sources(
    teaching: Callable[..., Any], beam: int
) -> None:
    place = teaching(beam=beam)
    training = sides_of(place.task.pairs.split("train"))
    found = sides_of(said_by_teacher(place))
    assert [source for source, _ in found] == [source for source, _ in training[:SENTENCES]]
    model = place.model.eval()
    with torch.inference_mode():
        for source, target in found:
            alone = beam_search(model, torch.tensor([[*source, EOS]]), Decoding(beam=beam))[0][0].tokens
            assert target == (greedy(model, source) if beam == 1 else alone)
    assert [target for _, target in found] != [target for _, target in training[:SENTENCES]]


def test_all_that_is_trained_on_are_these_pairs(teaching: Callable[..., Any]) -> None:
    place = teaching()
    taught = said_by_teacher(place)
    task = place.task.with_training(taught).with_seed(3)
    seen = set()
    for step in range(6):
        batch = task.batch(step)
        for source, target, labels in zip(batch.source, batch.target, batch.labels, strict=True):
            said = target[1 : (target != PAD).sum()].tolist()
            seen.add((tuple(source[: (source != PAD).sum() - 1].tolist()), tuple(said)))
            assert labels[: len(said)].tolist() == said and labels[len(said)] == EOS
    assert seen == {(tuple(source), tuple(target)) for source, target in sides_of(taught)}
    assert len(place.task.with_seed(3).batch.split) > len(task.batch.split) == SENTENCES


def loss_of(model: nn.Module, taught: PairSplit) -> float:
    """Mean negative log-likelihood of what the teacher says."""
    total, count = 0.0, 0
    with torch.inference_mode():
        for source, target in sides_of(taught):
            given, read = torch.tensor([[*source, EOS]]), torch.tensor([[EOS, *target]])
            logits = model.eval()(given, read, torch.arange(len(target) + 1))
            total += float(F.cross_entropy(logits, torch.tensor([*target, EOS]), reduction="sum"))
            count += len(target) + 1
    return total / count


def test_a_pruned_student_learns_to_say_it_and_stays_pruned(teaching: Callable[..., Any], tmp_path: Path) -> None:
    still = {"increment": 60, "recovery": {"max_steps": 0}}
    place = teaching("prune60+seqdistill", steps=60, prune=still)
    before = teaching("prune60", "before", prune=still).compress()
    compressed = place.compress()
    taught = said_by_teacher(place)
    assert loss_of(compressed.model, taught) < 0.7 * loss_of(before.model, taught)
    weights = matrices(compressed.model, True)
    assert all(not weights[name][~mask].any() for name, mask in compressed.masks.items()) and compressed.masks
    place.assert_comes_back(compressed, tmp_path)


def test_what_decoding_cost_stands_in_every_record_that_uses_it(
    teaching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    first = teaching("seqdistill+quant8")
    first.compress()
    record = first.bench.run.stage_record(first.stages[0])
    pairs, count = sides_of(said_by_teacher(first)), forward_flops(first.model)
    flops = sum(count.translating((1, len(s) + 1), (2, len(t) + 1), 2 * (len(t) + 1)) for s, t in pairs)
    decoding = record["decoding"]
    assert decoding["flops"] == pytest.approx(flops) and decoding["steps"] == 0
    assert decoding["tokens"] == sum(len(source) + len(target) + 2 for source, target in pairs)
    assert record["clock"]["steps"] == 4 and record["seconds"] >= record["clock"]["seconds"] + decoding["seconds"] > 0

    monkeypatch.setattr(seqdistill, "beam_search", lambda *_: pytest.fail("decoded again"))
    second = teaching("oneshot30+seqdistill", oneshot={"recovery": {"max_steps": 0}})
    second.compress()
    assert second.bench.run.stage_record(second.stages[-1])["decoding"] == decoding
    assert second.bench.run.stage_record(second.stages[0])["decoding"]["seconds"] == 0


@pytest.mark.parametrize("stop", [2, 3, 7])
def test_interrupted_while_it_decodes_or_trains_it_ends_in_the_same_weights(
    teaching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    """Three pieces of four sources at most, then four steps; at each there is a look at whether to stop."""
    monkeypatch.setattr(seqdistill, "_PIECE", 4)
    calm = teaching(directory="calm").compress()
    place, looks = teaching(directory="stopped"), iter(range(1, 100))
    with monkeypatch.context() as patch:
        patch.setattr(interrupt, "requested", lambda: next(looks) >= stop)
        with pytest.raises(interrupt.Interrupted):
            place.compress()
    pieces = sorted(place.bench.run.path.glob("stages/*/beam2/*.npz"))
    assert len(pieces) == min(stop - 1, 3)
    written = [path.stat().st_mtime_ns for path in pieces]
    resumed = place.compress()
    assert [path.stat().st_mtime_ns for path in pieces] == written
    for name, parameter in calm.model.named_parameters():
        assert torch.equal(parameter, resumed.model.get_parameter(name)), name


def test_a_whole_run_decodes_once_and_its_rows_say_what_it_cost(
    build_task: Callable[..., Any], untimed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    monkeypatch.setattr(
        seqdistill, "decode_lines", lambda *arguments: calls.append(arguments) or decode_lines(*arguments)
    )
    config = build_task("translation").config
    settings = {"sentences": SENTENCES, "beam": 2, "steps": 3}
    cell = locate(config.changed(recipes=["none", "seqdistill", "seqdistill+quant4"], steps={"seqdistill": settings}))
    Run(cell).work()
    rows = {row["recipe"]: row for row in cell.directory.points().values()}
    record = cell.directory.stage_record(cell.plan.recipes["seqdistill"][0])
    assert record is not None and len(calls) == 1
    for recipe in ("seqdistill", "seqdistill+quant4"):
        assert rows[recipe]["compress_flops"] == record["clock"]["flops"] + record["decoding"]["flops"]
        assert rows[recipe]["compress_steps"] == 3 and rows[recipe]["compress_seconds"] > record["decoding"]["seconds"]
    assert rows["none"]["compress_flops"] == 0 and rows["seqdistill+quant4"]["bytes"] < rows["none"]["bytes"] / 2


def test_a_damaged_piece_is_named(teaching: Callable[..., Any]) -> None:
    place = teaching()
    said_by_teacher(place)
    (path,) = place.bench.run.path.glob("stages/*/beam2/*.npz")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(Damaged, match=rf"{path.name} is damaged .*; delete .*beam2 and give the same command again"):
        said_by_teacher(place)


def test_more_sentences_than_there_are_are_all(teaching: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    place = teaching()
    monkeypatch.setattr(seqdistill, "_translated", lambda bench, training, numbers, beam: piece_of(len(numbers)))
    bench = dataclasses.replace(place.bench, key=place.stages[0])
    everything = len(place.task.pairs.split("train"))
    assert len(seqdistill.translations(bench, SeqDistill(sentences=10**6))) == everything > 500


def piece_of(count: int) -> bytes:
    """A file of so many pairs of a token and nothing."""
    file = io.BytesIO()
    lengths = np.tile([1, 0], count)
    np.savez(file, tokens=np.full(count, 7, dtype=np.uint16), lengths=lengths, flops=1.0, seconds=1.0)
    return file.getvalue()


@pytest.mark.parametrize(
    "recipe, settings, words",
    [
        ("seqdistill5", {}, "'seqdistill5' is not a method without strength"),
        ("quant8+seqdistill", {}, "quant8 must be the last step"),
        ("seqdistill", {"beam": 0}, "steps.seqdistill.beam=0: must be greater than or equal to 1"),
        ("seqdistill", {"beam": 17}, "steps.seqdistill.beam=17: must be less than or equal to 16"),
        ("seqdistill", {"sentences": 0}, "steps.seqdistill.sentences=0: must be greater than or equal to 1"),
        ("seqdistill", {"alpha": 0.5}, "steps.seqdistill.alpha=0.5: there is no such setting"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(recipe: str, settings: dict[str, Any], words: str) -> None:
    values = {"task": {"name": "translation"}, "data": {"name": "debian_pairs"}, "model": {"name": "transformer"}}
    with pytest.raises(ConfigError) as error:
        Config.build(values | {"recipes": [recipe], "steps": {"seqdistill": settings}})
    assert words in str(error.value)


def test_other_tasks_have_no_sequences() -> None:
    with pytest.raises(ConfigError, match="'seqdistill': seqdistill works for task=translation only"):
        Config.build({"recipes": ["seqdistill"]})
