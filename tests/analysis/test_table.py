"""The table against the numbers that were written."""

from __future__ import annotations

import io
import json
import math
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest

from train_then_compress.analysis.table import COLUMNS, averaged, load_study, recipe_family, render, with_engines
from train_then_compress.records import RunDirectory, append_row, read_rows, rewrite_rows, write_json

Writer = Callable[..., RunDirectory]


def test_one_documented_row_per_point_and_one_for_the_unigram_model(study: Path) -> None:
    points = load_study(study).points
    assert list(points.columns) == list(COLUMNS)
    assert all(text and text.strip() == text for text in COLUMNS.values())
    assert len(points) == 1 + 3 * 8 + 6
    unigram = points[points["recipe"] == "unigram"].iloc[0]
    assert unigram["test_perplexity"] == 533 and unigram["validation_perplexity"] == 540
    assert unigram["test_loss"] == pytest.approx(math.log(533))
    assert not unigram["frontier"] and unigram["run"] == ""


def test_values_are_those_of_the_records(study: Path) -> None:
    points = load_study(study).points
    row = points[(points["depth"] == 2) & (points["width"] == 128) & (points["recipe"] == "quant4")].iloc[0]
    parameters = 12 * 2 * 128**2 + 2048 * 128
    assert row["parameters"] == parameters and row["bytes"] == round(parameters * 4.25 / 8) + 900
    assert row["compression_ratio"] == pytest.approx((2 * parameters + 900) / (round(parameters * 4.25 / 8) + 900))
    assert row["study"] == "sizes" and row["budget_kind"] == "seconds" and row["budget"] == 600
    assert row["train_seconds"] == pytest.approx(600) and row["train_tokens"] == row["train_steps"] * 2048
    assert row["unigram_share"] == pytest.approx(row["validation_perplexity"] / 540)
    assert set(row["weight_errors"]) == {"layers.0.fc1", "layers.0.fc2"}


def test_rows_go_by_size_then_from_light_to_strong_compression(study: Path) -> None:
    points = load_study(study).points
    assert points["depth"].dropna().drop_duplicates().tolist() == [1, 2, 4]
    assert points["width"].dropna().drop_duplicates().tolist() == [64, 128, 192]
    own = ["none", "oneshot60", "prune30", "prune60", "quant8", "quant4", "quant2", "prune60+quant4"]
    assert points["recipe"].tolist()[:9] == ["unigram", *own]


def test_frontier_column_is_that_of_a_comparison_pair_by_pair(study: Path) -> None:
    points = load_study(study).points
    rows = [row for row in points.to_dict("records") if row["recipe"] != "unigram" and row["test_perplexity"] < 533]
    best = {
        row["point"] for row in rows
        if not any((other["bytes"] <= row["bytes"] and other["test_perplexity"] < row["test_perplexity"])
                   or (other["bytes"] < row["bytes"] and other["test_perplexity"] <= row["test_perplexity"])
                   for other in rows)
    }  # fmt: skip
    assert set(points.loc[points["frontier"], "point"]) == best
    smallest = points.sort_values("bytes").iloc[0]
    assert smallest["test_perplexity"] > 533 and not smallest["frontier"], "the smallest file is a ruined model"


def test_what_is_missing_is_said_in_words(study: Path) -> None:
    said = {sentence.split(":")[0].rsplit("-", 1)[0]: sentence for sentence in load_study(study).missing}
    assert set(said) == {"mlm-d6-w256-s0", "mlm-d4-w256-s0", "mlm-d2-w192-s0", "just"}
    assert "stopped at 34% of its budget: the loss is nan at step 812; no point yet for none" in said["mlm-d6-w256-s0"]
    assert "training stands at 49% of its budget" in said["mlm-d4-w256-s0"]
    assert said["mlm-d2-w192-s0"].endswith("no point yet for prune60+quant4, oneshot60")
    assert said["just"] == "just-started: started, nothing recorded yet"


def test_a_run_that_learned_nothing_is_named_and_never_on_the_frontier(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "s", 1, 64)
    idle = write(tmp_path / "s", 1, 32, loss=math.log(271))
    loaded = load_study(tmp_path / "s")
    assert loaded.missing == [f"{idle.path.name}: left out of the figures: validation perplexity not below half of the "
                              "unigram model's (271 against 540)"]  # fmt: skip
    points = loaded.points
    assert len(points[points["width"] == 32]) == 8 and not points.loc[points["width"] == 32, "frontier"].any()
    assert points["frontier"].any()


def test_the_last_row_of_a_recipe_counts_and_a_torn_line_does_not(tmp_path: Path, write: Writer) -> None:
    run = write(tmp_path / "s", 1, 64)
    old = run.points()
    row = next(row for row in old.values() if row["recipe"] == "quant4")
    append_row(run.path / "points.jsonl", row | {"point": "regrouped", "test_perplexity": 19.5})
    with (run.path / "points.jsonl").open("a") as file:
        file.write('{"point": "torn", "recipe": "quant8", "test_perp')
    points = load_study(tmp_path / "s").points.set_index("recipe")
    assert len(points) == 9
    assert points.loc["quant4", "point"] == "regrouped" and points.loc["quant4", "test_perplexity"] == 19.5
    assert points.loc["quant8", "point"] in old


def test_a_failure_that_was_overcome_is_not_mentioned(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "s", 1, 64, failure="the loss is nan at step 3")
    assert load_study(tmp_path / "s").missing == []


def test_a_latency_of_a_busy_machine_is_named(tmp_path: Path, write: Writer) -> None:
    run = write(tmp_path / "s", 1, 64)
    rows = read_rows(run.path / "points.jsonl")
    rewrite_rows(run.path / "points.jsonl", [row | {"latency_iqr_ms": 0.6 * row["latency_ms"]}
                                             if row["recipe"] == "quant4" else row for row in rows])  # fmt: skip
    loaded = load_study(tmp_path / "s")
    assert loaded.missing == []
    assert [sentence.split(": ")[0] for sentence in loaded.unsteady] == [f"{run.path.name}:quant4"]


def test_an_unreadable_run_is_named_and_the_others_stand(study: Path) -> None:
    run = next(study.glob("mlm-d1-*"))
    (run / "config.yaml").write_text("model: {name: roberta, depth: 99}\n")
    loaded = load_study(study)
    assert len(loaded.points) == 1 + 2 * 8 + 6
    assert any(sentence.startswith(f"{run.name}: cannot be read") and "99" in sentence for sentence in loaded.missing)


def test_settings_that_tell_runs_of_one_shape_apart_are_their_variant(tmp_path: Path, write: Writer) -> None:
    for rate in (0.001, 0.003):
        write(tmp_path / "rates", 1, 64, optimizer={"lr": rate})
    assert set(load_study(tmp_path / "rates").runs["variant"]) == {"lr=0.001", "lr=0.003"}
    write(tmp_path / "rule", 1, 64, optimizer={"lr": 0.003})
    write(tmp_path / "rule", 2, 128, optimizer={"lr": 0.001})
    write(tmp_path / "rule", 2, 128, seed=1, optimizer={"lr": 0.001})
    assert set(load_study(tmp_path / "rule").runs["variant"]) == {""}, "a rate that goes with the shape is no variant"


def test_csv_and_json_carry_every_column(study: Path) -> None:
    points = load_study(study).points
    read = pd.read_csv(io.StringIO(render(points, "csv")), keep_default_na=False, na_values=[""])
    assert list(read.columns) == list(COLUMNS) and len(read) == len(points)
    assert read["test_perplexity"].tolist() == points["test_perplexity"].tolist()
    assert read["recipe"].tolist() == points["recipe"].tolist(), "the recipe none is not a missing value"
    assert json.loads(read["weight_errors"].iloc[2]) == points["weight_errors"].iloc[2]
    rows = json.loads(render(points, "json"))
    assert [row["bytes"] for row in rows] == [None, *points["bytes"].iloc[1:]]
    assert {key for row in rows for key in row} == set(COLUMNS)
    assert isinstance(rows[1]["depth"], int) and rows[1]["frontier"] in (True, False)


def test_markdown_is_rounded_with_units_in_its_head(tmp_path: Path, write: Writer) -> None:
    write(tmp_path / "s", 1, 64, recipes=["none"])
    points = load_study(tmp_path / "s").points
    points.loc[1, ["test_perplexity", "test_accuracy", "bytes", "bytes_bf16", "throughput"]] = [
        17.1234, 0.41678, 1234567, 2469134, 76543.2,
    ]  # fmt: skip
    lines = [[cell.strip() for cell in line.strip("|\n").split("|")] for line in render(points, "md").splitlines()]
    shown = dict(zip(lines[0], lines[3], strict=True))
    assert shown["test perplexity"] == "17.12" and shown["test accuracy (%)"] == "41.7"
    assert shown["size (MB)"] == "1.23" and shown["tokens/s"] == "76,543" and shown["recipe"] == "none"
    assert lines[2][lines[0].index("test perplexity")] == "533.0", "the unigram model's row"
    assert "seed" not in shown and "variant" not in shown, "what does not differ is not shown"
    assert {len(line) for line in lines} == {len(lines[0])} and set("".join(lines[1])) == {"-", ":"}


def test_seeds_are_averaged_and_their_range_is_shown(tmp_path: Path, write: Writer) -> None:
    for seed, loss in enumerate([1.0, 2.0, 4.0]):
        write(tmp_path / "s", 1, 64, seed=seed, loss=loss, recipes=["none"])
    means = averaged(load_study(tmp_path / "s").points)
    dense = means[means["recipe"] == "none"].iloc[0]
    values = [math.exp(loss) for loss in (1.0, 2.0, 4.0)]
    assert dense["seeds"] == 3 and dense["test_perplexity"] == pytest.approx(sum(values) / 3, rel=0.05)
    head, _, *rows = [line.strip("|\n").split("|") for line in render(means, "md").splitlines()]
    shown = dict(zip(map(str.strip, head), map(str.strip, rows[-1]), strict=True))
    low, high = dense["test_perplexity_low"], dense["test_perplexity_high"]
    assert shown["test perplexity"] == f"{dense['test_perplexity']:.2f} ({low:.3f} to {high:.2f})" and low < high
    assert shown["seeds"] == "3" and "weight_errors" not in means
    assert render(means, "csv").count("\n") == 3


def test_latencies_on_engines_stand_beside_their_points(tmp_path: Path, write: Writer) -> None:
    runs = [write(tmp_path / "s", 1, 64, seed=seed, recipes=["none", "quant4"]).path.name for seed in (0, 1)]
    rows = [{"point": f"{runs[0]}:quant4", "engine": "onnx", "unavailable": None, "latency_ms": 1.25},
            {"point": f"{runs[0]}:none", "engine": "int4", "unavailable": "no 4-bit codes"}]  # fmt: skip
    points = with_engines(load_study(tmp_path / "s").points, {"rows": rows})
    assert points["latency_ms_onnx"].dropna().tolist() == [1.25] and "latency_ms_int4" not in points
    for frame in (points, averaged(points)):
        head, _, *lines = [line.strip("|\n").split("|") for line in render(frame, "md").splitlines()]
        place = [cell.strip() for cell in head].index("onnx latency (ms)")
        assert sorted(line[place].strip() for line in lines)[-2:] == ["", "1.25"]


def test_an_unknown_format_is_named(study: Path) -> None:
    with pytest.raises(ValueError, match=r"format='xml': allowed are md, csv and json"):
        render(load_study(study).points, "xml")


def test_a_study_that_is_not_there_is_named_with_those_that_are(study: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no such study; studies in .*: sizes"):
        load_study(study.parent / "size")
    (study.parent / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="no run in it yet"):
        load_study(study.parent / "empty")


def test_a_study_without_points_has_an_empty_table(tmp_path: Path, write: Writer) -> None:
    run = write(tmp_path / "s", 1, 64, progress=0.0)
    loaded = load_study(tmp_path / "s")
    assert loaded.points.empty and list(loaded.points.columns) == list(COLUMNS)
    assert loaded.missing[0].startswith(f"{run.path.name}: training stands at 0% of its budget")
    assert render(loaded.points, "md").count("\n") == 2


def test_points_of_an_older_form_leave_columns_empty(tmp_path: Path, write: Writer) -> None:
    run = write(tmp_path / "s", 1, 64, recipes=["none"], points=[])
    append_row(run.path / "points.jsonl", {"point": "p", "recipe": "none", "test_perplexity": 20.0, "bytes": 10})
    write_json(run.path / "result.json", {"points": {"none": "p"}})
    points = load_study(tmp_path / "s").points
    assert points["test_perplexity"].tolist() == [533.0, 20.0] and points["latency_ms"].isna().all()
    assert json.loads(render(points, "json"))[1]["latency_ms"] is None


@pytest.mark.parametrize(
    ("recipe", "family"),
    [("none", "dense"), ("quant4", "quant"), ("prune60+quant4", "prune+quant"), ("oneshot60", "oneshot")],
)
def test_families_are_recipes_without_strengths(recipe: str, family: str) -> None:
    assert recipe_family(recipe) == family


def test_the_table_needs_neither_torch_nor_matplotlib() -> None:
    code = "import sys, train_then_compress.analysis.table; print({'torch', 'matplotlib'} & set(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
