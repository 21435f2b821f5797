"""The step ``exit``: training of the heads, the stored file, the row of a point, and what is refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file

from train_then_compress.analysis.table import load_study
from train_then_compress.cell import locate
from train_then_compress.compression import exit as method
from train_then_compress.compression.bench import Bench
from train_then_compress.compression.calibration import linear_inputs
from train_then_compress.compression.compressed import Compressed, matrices
from train_then_compress.compression.packing import pack, unpack
from train_then_compress.compression.prune import prune
from train_then_compress.config import Config, ConfigError, parse_recipe
from train_then_compress.config.labelled import CsvFiles
from train_then_compress.config.steps import Prune
from train_then_compress.data.examples import prepare_labelled
from train_then_compress.data.prepare import PAD, Prepared
from train_then_compress.models.early_exit import EarlyExitClassifier
from train_then_compress.records import RunDirectory, StageKey, digest
from train_then_compress.run import Run, work
from train_then_compress.tasks.classification import ClassificationTask
from train_then_compress.tracking.metrics import MetricsLog

Values = dict[str, Any]


pytestmark = pytest.mark.usefixtures("untimed")


@pytest.fixture
def values(labelled_file: Path, text_file: Path, cache: Path, tmp_path: Path) -> Values:
    """A small classifier, pretrained before."""
    return {
        "study": "exits", "task": {"name": "classification"}, "model": {"depth": 3, "width": 32, "head_size": 16},
        "pretrain": {
            "data": {"name": "text_files", "train": str(text_file), "vocab_size": 400, "sequence_length": 32},
            "budget": {"kind": "steps", "value": 2}, "optimizer": {"batch_size": 8, "warmup": 0.0},
        },
        "data": {"name": "csv_files", "train": str(labelled_file), "sequence_length": 32},
        "budget": {"kind": "steps", "value": 100}, "optimizer": {"lr": 5e-3, "batch_size": 16},
        "evaluation": {"points": 1}, "runtime": {"dtype": "fp32", "threads": 1},
        "paths": {"runs": str(tmp_path / "runs"), "cache": str(cache)},
    }  # fmt: skip


@pytest.fixture
def task(values: Values, prepared: Prepared, labelled_file: Path, cache: Path) -> ClassificationTask:
    data = prepare_labelled(CsvFiles(train=str(labelled_file), sequence_length=32), prepared.tokenizer, cache)
    return ClassificationTask(Config.build(values), data, 0)


def exited(
    task: ClassificationTask, directory: Path, settings: Values, recipe: str = "exit60",
    before: Callable[[Compressed], None] = lambda compressed: None,
) -> tuple[Compressed, dict[str, torch.Tensor]]:  # fmt: skip
    """A classifier with random, telling states after the step, and its weights before."""
    model = task.new_model()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    compressed = Compressed(copy.deepcopy(model))
    before(compressed)
    weights = {name: value.clone() for name, value in compressed.model.state_dict().items()}
    (step,) = parse_recipe(recipe, {"exit": settings}, task.config.model, "classification")
    key = StageKey(recipe, digest([recipe, settings]), step)
    run = RunDirectory(directory)
    method.apply(compressed, step, Bench(task, task.config, run, MetricsLog(run.metrics), 0.0, model, key))
    return compressed, weights


def losses(task: ClassificationTask, compressed: Compressed) -> list[float]:
    """The loss of each exit on a large batch."""
    parts = [part for step in range(8) for part in task.parts(task.with_seed(99).batch(step), 0, 1, 0)]
    model = compressed.model.eval()
    assert isinstance(model, EarlyExitClassifier)
    with torch.no_grad():
        each = [[F.cross_entropy(logits, part.labels) for logits in model.every_exit(part.tokens)] for part in parts]
    return torch.tensor(each).mean(dim=0).tolist()


def test_a_frozen_trunk_is_left_bit_for_bit_and_the_heads_learn(task: ClassificationTask, tmp_path: Path) -> None:
    compressed, before = exited(task, tmp_path / "a", {"steps": 200, "lr_factor": 5.0})
    short, _ = exited(task, tmp_path / "b", {"steps": 1})
    after = compressed.model.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    new = {name for name in after if name not in before}
    assert new and all(name.startswith("exits.") for name in new)
    ends, starts = losses(task, compressed), losses(task, short)
    assert len(ends) == 3 and ends[2] == pytest.approx(starts[2])
    assert all(end < start - 0.05 for end, start in zip(ends[:2], starts[:2], strict=True))
    assert all(parameter.requires_grad for parameter in compressed.model.parameters())


def test_trained_jointly_every_exit_learns_and_pruned_weights_stay_zero(
    task: ClassificationTask, tmp_path: Path
) -> None:
    compressed, before = exited(
        task, tmp_path / "a", {"steps": 80, "trunk": "joint", "every": 2}, before=lambda c: prune(c, 0.3, Prune())
    )
    after = compressed.model.state_dict()
    assert sum(not torch.equal(after[name], value) for name, value in before.items()) > 20
    assert next(name for name in after if name.startswith("exits.")).startswith("exits.2.")
    weights = matrices(compressed.model, True)
    assert compressed.masks and all(not weights[name][~mask].any() for name, mask in compressed.masks.items())
    untrained, _ = exited(task, tmp_path / "b", {"steps": 1, "every": 2})
    ends, starts = losses(task, compressed), losses(task, untrained)
    assert len(ends) == 2 and all(end < start - 0.1 for end, start in zip(ends, starts, strict=True))


def test_the_loss_is_the_sum_over_exits(task: ClassificationTask, tmp_path: Path) -> None:
    compressed, _ = exited(task, tmp_path, {"steps": 1})
    model = compressed.model.eval()
    (part,) = task.parts(task.batch(0), 0, 1, 0)
    loss, terms = task.loss(model, part)
    expected = sum(F.cross_entropy(logits, part.labels, reduction="sum") for logits in model(part.tokens))
    assert terms == 16 and loss.item() == pytest.approx(expected.item(), rel=1e-6)


def test_the_packed_file_gives_back_model_threshold_and_logits(task: ClassificationTask, tmp_path: Path) -> None:
    compressed, _ = exited(task, tmp_path, {"steps": 20}, "exit45")
    path = tmp_path / "packed.safetensors"
    path.write_bytes(pack(compressed, torch.float32, {}))
    back = unpack(path, task.new_model())
    assert isinstance(back.model, EarlyExitClassifier) and back.model.threshold == 0.45
    assert back.structure == [{"method": "exit", "every": 1, "threshold": 0.45}]
    (part,) = task.parts(task.batch(0), 0, 1, 0)
    with torch.inference_mode():
        first, second = (model.eval()(part.tokens) for model in (compressed.model, back.model))
    assert torch.equal(first, second) and first.dim() == 2


def test_average_depth_is_the_mean_over_single_test_examples(task: ClassificationTask, tmp_path: Path) -> None:
    compressed, _ = exited(task, tmp_path, {"steps": 20}, "exit25")
    model = compressed.model.eval()
    assert isinstance(model, EarlyExitClassifier)
    examples = list(task.examples("test"))
    assert len(examples) == len(task.data.split("test")) and all(not (row == PAD).any() for row in examples)
    with torch.inference_mode():
        sure = torch.cat([model.every_exit(row)[0] for row in examples]).softmax(dim=1).amax(dim=1).sort().values
        model.threshold = float(sure[len(sure) // 2 :][:2].mean())
        layers = []
        for row in examples:
            everywhere = model.every_exit(row, padded=False)[:, 0].softmax(dim=1).amax(dim=1) >= model.threshold
            layers.append(next((depth for depth in (1, 2) if everywhere[depth - 1]), 3))
    assert 1 < sum(layers) / len(layers) < 3
    assert task.average_depth(model) == pytest.approx(sum(layers) / len(layers), rel=1e-9)


def test_calibration_sees_every_layer_and_head(task: ClassificationTask, tmp_path: Path) -> None:
    compressed, _ = exited(task, tmp_path, {"steps": 1}, "exit1")
    (part,) = task.parts(task.batch(0), 0, 1, 0)
    rows: dict[str, int] = {}
    linear_inputs(compressed.model, task, [part], lambda name, inputs: rows.__setitem__(name, len(inputs)))
    assert rows.keys() == matrices(compressed.model, False).keys()
    real = int((part.tokens != PAD).sum())
    assert all(count == (real if ".layers." in name else part.terms) for name, count in rows.items())


def test_a_recipe_with_exits_runs_to_its_rows(values: Values) -> None:
    """Its quality is that of the stored file with exits, and only its row has an average depth."""
    config = Config.build(values | {
        "recipes": ["none", "exit60", "exit60+prune30+quant8"],
        "steps": {"exit": {"steps": 60}, "prune": {"increment": 30, "recovery": {"max_steps": 5}}},
    })  # fmt: skip
    cell = locate(config)
    work(cell)
    assert cell.done
    points = {row["recipe"]: row for row in cell.directory.points().values()}
    assert "average_depth" not in points["none"] and points["none"]["example_latency_ms"] > 0
    for recipe in ("exit60", "exit60+prune30+quant8"):
        assert 1 <= points[recipe]["average_depth"] < 3 and points[recipe]["test_accuracy"] > 0.4
        assert points[recipe]["parameters"] > points["none"]["parameters"]
    (exits,) = cell.directory.path.glob("stages/exit60-*/model.safetensors")
    trunk = dict(unpack(exits, Run(cell).task.new_model()).model.named_parameters())
    dense = load_file(cell.directory.stage(cell.plan.dense) / "model.safetensors")
    assert all(torch.equal(trunk[name], weight) for name, weight in dense.items())
    table = load_study(cell.directory.path.parent).points.set_index("recipe")
    assert table.loc["exit60", "average_depth"] == points["exit60"]["average_depth"]
    assert table.loc[["none", "majority"], "average_depth"].isna().all()


@pytest.mark.parametrize("recipe, settings, words", [
    ("exit0", {}, "recipes: exit0: the confidence must lie between 1 and 99 per cent"),
    ("exit100", {}, "recipes: exit100: the confidence must lie between 1 and 99 per cent"),
    ("exit", {}, "'exit' is not a method and a strength"),
    ("exit50", {"every": 3}, "steps.exit.every=3: must be below model.depth=3, so that an exit lies inside"),
    ("exit50", {"every": 0}, "steps.exit.every=0: must be greater than or equal to 1"),
    ("exit50", {"trunk": "thawed"}, "steps.exit.trunk='thawed': must be 'frozen' or 'joint'"),
    ("exit50", {"steps": 0}, "steps.exit.steps=0: must be greater than or equal to 1"),
    ("exit50", {"lr_factor": 0}, "steps.exit.lr_factor=0: must be greater than 0"),
    ("prune30+exit50", {}, "exit50 changes shapes and must stand before prune30"),
])  # fmt: skip
def test_what_cannot_be_is_refused(values: Values, recipe: str, settings: Values, words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build(values | {"recipes": [recipe], "steps": {"exit": settings}})
    assert words in str(error.value)


def test_a_masked_lm_has_no_exits() -> None:
    with pytest.raises(ConfigError, match="exit works for task=classification only"):
        Config.build({"recipes": ["exit50"]})
