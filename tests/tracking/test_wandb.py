"""Weights & Biases: offline runs read back with W&B's own reader, live runs against a stand-in."""

import json
import logging
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import yaml

from train_then_compress.config import TrackerConfig
from train_then_compress.tracking import wandb_tracker
from train_then_compress.tracking.metrics import MetricsLog
from train_then_compress.tracking.wandb_tracker import LiveTracker, log_frontier, replay, stable_id, track_study

OFFLINE = TrackerConfig(name="wandb", mode="offline", project="budgets")
ONLINE = TrackerConfig(name="wandb", mode="online", project="budgets", entity="lab")
POINTS = [
    {"point": "p0", "recipe": "none", "test_loss": 2.0, "test_perplexity": 7.39, "bytes": 4000, "weight_errors": {}},
    {"point": "p1", "recipe": "prune15+quant4", "test_loss": 2.1, "test_perplexity": 8.17, "bytes": 900, "extra": None},
]


@pytest.fixture(autouse=True)
def own_environment(monkeypatch, tmp_path):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    for name in ("DATA", "CACHE", "CONFIG"):
        monkeypatch.setenv(f"WANDB_{name}_DIR", str(tmp_path / "outside" / name))


def metric_row(stage, split, steps, **values):
    spent = {"progress": steps / 100, "seconds": steps * 0.5, "flops": steps * 1e9, "tokens": steps * 2048}
    return {"stage": stage, "split": split, **spent, "steps": steps, **values}


def pretraining(depth):
    stage = "pretrain-0123abcd"
    for steps in (25, 50, 75, 100):
        yield metric_row(stage, "train", steps, loss=5 - steps / 50 + depth, lr=1e-3, tokens_per_second=9e3)
        if steps > 50:
            yield metric_row(stage, "validation", steps, loss=3.0, perplexity=2000 / steps, accuracy=0.4)


def recovery(stage):
    for steps in (0, 25):
        yield metric_row(stage, "validation", steps, loss=3.1, perplexity=22.2, accuracy=0.3 + steps / 1000)


def write_run(study, depth, rows, points=()):
    run = study / f"mlm-d{depth}-w64-tokens204800-s0-0123abcd"
    run.mkdir(parents=True)
    config = {"task": {"name": "mlm"}, "model": {"depth": depth}, "budget": {"kind": "tokens", "value": 204800.0}}
    (run / "config.yaml").write_text(yaml.safe_dump(config))
    for name, content in (("metrics.jsonl", rows), ("points.jsonl", points)):
        (run / name).write_text("".join(json.dumps(row) + "\n" for row in content))
    return run


def inspect(directory, *options):
    """The objects that W&B's own reader prints about an offline run."""
    command = [sys.executable, "-m", "wandb", "leet", "inspect", "--json", *options, str(directory)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60).stdout
    return [json.loads(line) for line in printed.splitlines()] if not options else json.loads(printed)


def of_type(records, kind):
    return [record[kind] for record in records if record["type"] == kind]


def test_an_offline_run_tells_what_metrics_jsonl_tells(tmp_path):
    rows = [*pretraining(2), *recovery("prune15-aaaa1111")]
    run = write_run(tmp_path / "study", 2, rows, POINTS)
    first = replay(run, "study", OFFLINE, tmp_path / "study")
    second = replay(run, "study", OFFLINE, tmp_path / "study")
    assert list((tmp_path / "study" / "wandb").iterdir()) == [second]
    assert first.parent == second.parent
    assert not (tmp_path / "outside" / "DATA").exists()  # the tables' files are kept with the run

    records = inspect(second)
    (told,) = of_type(records, "run")
    assert told["run_id"] == stable_id("study", run.name)
    assert (told["project"], told["run_group"], told["job_type"]) == ("budgets", "study", "mlm")
    assert told["display_name"] == run.name
    assert told["config"]["update"]["budget"] == {"kind": "tokens", "value": 204800.0}
    assert "host" not in told
    assert_history([record["item"] for record in of_type(records, "history")], rows)
    assert_axes(of_type(records, "metric"))
    assert_results(inspect(second, "--summary")["summary"], second)


def assert_history(history, rows):
    """Every value of every row stands beside its seconds, FLOPs, tokens and steps."""
    steps = [item["_step"] for item in history]
    assert steps == sorted(set(steps))
    for row in rows:
        stage = row["stage"].rsplit("-", 1)[0]
        (item,) = [item for item in history if item.get(f"{stage}/steps") == row["steps"]]
        assert item["_step"] == row["steps"] + (100 if stage == "prune15" else 0)
        for axis in ("seconds", "flops", "tokens", "progress"):
            assert item[f"{stage}/{axis}"] == row[axis]
        for name in {"loss", "perplexity", "accuracy", "lr", "tokens_per_second"} & set(row):
            assert item[f"{stage}/{row['split']}/{name}"] == row[name]


def assert_axes(metrics):
    named = {metric["name"] for metric in metrics if "name" in metric}
    for stage in ("pretrain", "prune15"):
        assert {f"{stage}/{axis}" for axis in ("seconds", "flops", "tokens", "steps")} <= named
    assert {metric["glob_name"]: metric["step_metric"] for metric in metrics if "glob_name" in metric} == {
        "pretrain/train/*": "pretrain/tokens", "pretrain/validation/*": "pretrain/tokens",
        "prune15/train/*": "prune15/steps", "prune15/validation/*": "prune15/steps",
    }  # fmt: skip


def assert_results(summary, directory):
    assert summary["validation_perplexity"] == 20.0
    assert summary["points/none/bytes"] == 4000
    assert summary["points/prune15+quant4/test_perplexity"] == 8.17
    (table,) = (directory / "files" / "media" / "table").glob("points_*.table.json")
    content = json.loads(table.read_text())
    assert content["columns"] == ["point", "recipe", "test_loss", "test_perplexity", "bytes"]
    assert content["data"] == [["p0", "none", 2.0, 7.39, 4000], ["p1", "prune15+quant4", 2.1, 8.17, 900]]


def test_a_study_is_tracked_run_by_run_with_its_frontier(tmp_path):
    study = tmp_path / "study"
    runs = [write_run(study, depth, pretraining(depth)) for depth in (2, 4)]
    (study / "not-started").mkdir()
    assert track_study(study, TrackerConfig()) == [run.name for run in runs]
    log_frontier(study, [{"run": "a", "bytes": 4000, "errors": {"x": 1}}, {"run": "b", "bytes": 900.5}], OFFLINE)
    log_frontier(study, [{"run": "b", "bytes": 900.5}, {"run": "c", "marked": True}], OFFLINE)

    written = {path.name.rsplit("-", 1)[1]: path for path in (study / "wandb").iterdir()}
    assert set(written) == {stable_id("study", name) for name in [*(run.name for run in runs), "study-frontier"]}
    for depth, run in zip((2, 4), runs, strict=True):
        history = of_type(inspect(written[stable_id("study", run.name)]), "history")
        assert [record["item"]["pretrain/train/loss"] for record in history] == [
            4.5 + depth,
            4.0 + depth,
            3.5 + depth,
            3.0 + depth,
        ]
    (table,) = written[stable_id("study", "study-frontier")].glob("files/media/table/frontier_*.table.json")
    content = json.loads(table.read_text())
    assert (content["columns"], content["data"]) == (
        ["run", "bytes", "marked"], [["b", 900.5, None], ["c", None, True]]
    )  # fmt: skip


class StandIn:
    """As much of W&B as a live run uses, written down instead of sent."""

    def __init__(self, logged_in=True):
        self.logged_in = logged_in
        self.started, self.logged, self.summary, self.exit_codes = [], [], {}, []
        self.settings = SimpleNamespace(sync_dir="nowhere")
        self.fails = False

    def init(self, **arguments):
        self.started.append(arguments)
        return self

    def login(self, **arguments):
        assert arguments["prompt"] is False
        return self.logged_in

    def log(self, values, step=None):
        if self.fails:
            raise ConnectionError("no route to host")
        self.logged.append((step, values))

    def define_metric(self, name, **kinds):
        pass

    def finish(self, exit_code):
        self.exit_codes.append(exit_code)

    Settings = staticmethod(dict)
    Table = staticmethod(lambda columns, data, allow_mixed_types: data)


@pytest.fixture
def stand_in(monkeypatch):
    wandb = StandIn()
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    return wandb


def test_live_rows_are_sent_as_they_come_and_go_on_after_a_resume(tmp_path, stand_in):
    run = write_run(tmp_path, 2, [*pretraining(2), *recovery("prune15-aaaa1111")])
    log = MetricsLog(run / "metrics.jsonl")
    with LiveTracker(run, "study", ONLINE, tmp_path) as tracker:
        log.listeners.append(tracker)
        log.write(metric_row("prune15-aaaa1111", "validation", 50, accuracy=0.39, note="kept out"))
        log.write(metric_row("prune15-bbbb2222", "validation", 25, accuracy=0.41))
        (run / "points.jsonl").write_text(json.dumps(POINTS[0]) + "\n")
    (started,) = stand_in.started
    assert (started["id"], started["resume"]) == (stable_id("study", run.name), "allow")
    assert (started["mode"], started["entity"], started["reinit"]) == ("online", "lab", "create_new")
    (step, values), (later, others), (_, table) = stand_in.logged
    assert (step, values["prune15/validation/accuracy"], values["prune15/steps"]) == (150, 0.39, 50)
    assert set(values) == {f"prune15/{axis}" for axis in wandb_tracker.AXES} | {"prune15/validation/accuracy"}
    # A second stage of that name, with other settings, has curves of its own.
    assert (later, others["prune15-bbbb2222/validation/accuracy"]) == (175, 0.41)
    assert stand_in.summary["points/none/bytes"] == 4000
    assert table == {"points": [["p0", "none", 2.0, 7.39, 4000]]}
    assert stand_in.exit_codes == [0]


def test_a_live_tracker_that_loses_its_connection_does_not_stop_training(tmp_path, stand_in, caplog):
    run = write_run(tmp_path, 2, [])
    log = MetricsLog(run / "metrics.jsonl")
    with LiveTracker(run, "study", ONLINE, tmp_path) as tracker:
        log.listeners.append(tracker)
        stand_in.fails = True
        for row in pretraining(2):
            log.write(row)
    assert [record.getMessage() for record in caplog.records] == [
        f"LiveTracker no longer follows {run / 'metrics.jsonl'}: ConnectionError: no route to host"
    ]
    assert len(log.path.read_text().splitlines()) == 6


def test_a_failed_training_is_a_failed_run(tmp_path, stand_in):
    run = write_run(tmp_path, 2, [])
    with pytest.raises(FloatingPointError), LiveTracker(run, "study", ONLINE, tmp_path):
        raise FloatingPointError("loss is not finite")
    assert stand_in.exit_codes == [1]


@pytest.mark.parametrize("config", [TrackerConfig(), TrackerConfig(name="wandb", mode="disabled"), OFFLINE])
def test_only_an_online_tracker_is_live(tmp_path, stand_in, config):
    run = write_run(tmp_path, 2, [])
    with LiveTracker(run, "study", config, tmp_path) as tracker:
        tracker(metric_row("pretrain-0123abcd", "train", 1, loss=2.0))
    assert stand_in.started == stand_in.logged == []


@pytest.mark.parametrize("config", [TrackerConfig(), TrackerConfig(name="wandb", mode="disabled")])
def test_without_a_tracker_nothing_is_written(tmp_path, stand_in, config):
    run = write_run(tmp_path, 2, pretraining(2))
    assert replay(run, "study", config, tmp_path) is None
    log_frontier(tmp_path, [{"run": "a"}], config)
    assert stand_in.started == []


def every_entry(tmp_path, run):
    assert replay(run, "study", OFFLINE, tmp_path) is None
    assert track_study(tmp_path, OFFLINE) == []
    log_frontier(tmp_path, [{"run": "a"}], OFFLINE)
    with LiveTracker(run, "study", ONLINE, tmp_path) as tracker:
        tracker(metric_row("pretrain-0123abcd", "train", 1, loss=2.0))


def test_absent_wandb_is_a_warning(tmp_path, monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with caplog.at_level(logging.WARNING):
        every_entry(tmp_path, write_run(tmp_path, 2, pretraining(2)))
    assert len(caplog.records) == 4
    assert all("pip install wandb" in record.getMessage() for record in caplog.records)


def test_failing_wandb_is_a_warning(tmp_path, stand_in, caplog):
    def refuse(**arguments):
        raise OSError("no space left on device")

    stand_in.init = refuse
    with caplog.at_level(logging.WARNING):
        every_entry(tmp_path, write_run(tmp_path, 2, pretraining(2)))
    assert len(caplog.records) == 4
    assert all("OSError: no space left on device" in record.getMessage() for record in caplog.records)


def test_nobody_is_asked_to_log_in(tmp_path, stand_in, caplog):
    stand_in.logged_in = False
    run = write_run(tmp_path, 2, [])
    with LiveTracker(run, "study", ONLINE, tmp_path):
        pass
    assert stand_in.started == []
    assert "wandb login" in caplog.text


def test_ids_are_stable_and_legal():
    assert stable_id("study", "run") == stable_id("study", "run")
    assert stable_id("study", "run") != stable_id("stud", "yrun")
    assert len(stable_id("study", "run")) == 16
    assert stable_id("study", "run").isalnum()
