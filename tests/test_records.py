"""What counts for a stage's identity, and files that survive crashes and other processes."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field

from train_then_compress.config import Config
from train_then_compress.config.base import config_dataclass
from train_then_compress.records import (
    Busy,
    Plan,
    RunDirectory,
    append_row,
    atomic_write,
    digest,
    plan,
    read_json,
    read_rows,
    rewrite_rows,
    what,
    write_json,
)

MACHINE = {"cpu": "abacus", "cores": 2, "gpus": []}
TEXT = {"name": "text_files", "train": "corpus.txt"}

#: Settings that are part of the pretraining stage, each with values other than its default.
COUNTED: dict[str, list[Any]] = {
    "seed": [1, 2], "task.mask_rate": [0.3, 0.4], "data.sequence_length": [64, 256], "data.fraction": [0.5, 0.05],
    "model.depth": [2, 24], "model.width": [64, 128], "model.head_size": [32, 16], "model.norm": ["post"],
    "model.positions": ["rotary", "sinusoidal"], "model.dropout": [0.1], "model.tied": [False],
    "budget.value": [500, 1e6],
    "optimizer.lr": [0.1, 0.2], "optimizer.beta1": [0.8], "optimizer.beta2": [0.9], "optimizer.eps": [1e-8],
    "optimizer.weight_decay": [0.1], "optimizer.clip": [0.5], "optimizer.batch_size": [32, 64],
    "optimizer.batch_tokens": [1024, 8192],
    "optimizer.schedule": ["wsd", "inverse_sqrt"], "optimizer.warmup": [0.1], "optimizer.cooldown": [0.3],
    "runtime.dtype": ["fp32", "bf16"],
}  # fmt: skip
#: Settings that never are.
UNCOUNTED: dict[str, list[Any]] = {
    "study": ["other"], "tracker.name": ["wandb"], "tracker.mode": ["online"], "tracker.project": ["p"],
    "tracker.entity": ["e"], "paths.runs": ["/r"], "paths.cache": ["/c"], "evaluation.points": [3],
    "evaluation.first": [0.1], "evaluation.batch_size": [8], "evaluation.validation_sequences": [10],
    "evaluation.test_sequences": [10], "evaluation.beam": [1], "evaluation.validation_beam": [5],
    "evaluation.bleu_sentences": [7], "evaluation.length_penalty": [0.6], "evaluation.max_ratio": [2.0],
    "evaluation.max_extra": [20], "checkpoint.every_seconds": [1], "checkpoint.keep_at": [[0.5]],
    "checkpoint.keep_at_perplexity": [[30.0]],
    "recipes": [["none", "quant4"]], "steps": [{"quant": {"group_size": 16}}],
}  # fmt: skip
#: Settings that are where seconds are the budget.
TIMED: dict[str, list[Any]] = {
    "runtime.device": ["cuda"], "runtime.compile": [True], "runtime.threads": [1, 7], "runtime.processes": [2, 4],
    "runtime.micro_batch": [2, 4],
}  # fmt: skip


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {"data": dict(TEXT), "task": {"name": "mlm"}}
    for key, value in flat.items():
        group, _, name = key.rpartition(".")
        (values.setdefault(group, {}) if group else values)[name] = value
    return values


def planned(flat: dict[str, Any], kind: str = "steps", machine: dict[str, Any] = MACHINE, data: str = "d") -> Plan:
    return plan(Config.build(nested({"budget.kind": kind, **flat})), data, machine)


def settings(*tables: dict[str, list[Any]]) -> st.SearchStrategy[dict[str, Any]]:
    choices = {key: st.sampled_from(values) for table in tables for key, values in table.items()}
    return st.fixed_dictionaries({}, optional=choices)  # type: ignore[arg-type]


@given(settings(COUNTED), settings(COUNTED))
def test_two_trainings_are_one_stage_if_and_only_if_they_are_set_alike(a: dict[str, Any], b: dict[str, Any]) -> None:
    same = planned(a).dense.id == planned(b).dense.id
    assert same == (Config.build(nested(a)) == Config.build(nested(b)))


@pytest.mark.parametrize("key", COUNTED)
def test_every_setting_of_the_training_counts(key: str) -> None:
    ids = [planned({}).dense.id, *(planned({key: value}).dense.id for value in COUNTED[key])]
    assert len(set(ids)) == len(ids)


def test_the_tables_of_this_test_name_every_setting() -> None:
    config = Config.build(nested({}))
    leaves = {"branch_from", "budget.kind", "task.name", "model.name", "optimizer.name"}
    for field in dataclasses.fields(Config):
        value = getattr(config, field.name)
        names = (
            [f"{field.name}.{part.name}" for part in dataclasses.fields(value)]
            if hasattr(value, "__dataclass_fields__")
            else [field.name]
        )
        leaves |= {name for name in names if not name.startswith("data.")}
    tested = {*COUNTED, *UNCOUNTED, *TIMED, "branch_from", "budget.kind", "task.name", "model.name", "optimizer.name"}
    tested |= {"init_from", "pretrain", "distill"}  # below, tests/test_finetuning.py and tests/test_teacher.py
    tested.add("model.impl")  # in the next test: it does not go with every other setting
    assert leaves | {"data.sequence_length", "data.fraction"} == tested


def test_whose_code_computes_counts() -> None:
    assert planned({}).dense.id != planned({"model.impl": "fairseq"}).dense.id


@given(settings(COUNTED), settings(UNCOUNTED, TIMED), st.sampled_from(["steps", "tokens", "flops"]))
def test_machine_and_runtime_do_not_count_beside_a_counted_budget(
    counted: dict[str, Any], other: dict[str, Any], kind: str
) -> None:
    first = planned(counted, kind)
    second = planned({**counted, **other}, kind, machine={"cpu": "slide rule"})
    assert first.dense == second.dense and first.run_name == second.run_name


@given(settings(UNCOUNTED), settings(TIMED), settings(TIMED))
def test_machine_and_runtime_count_where_seconds_are_the_budget(
    other: dict[str, Any], a: dict[str, Any], b: dict[str, Any]
) -> None:
    ids = [planned({**timed, **other}, "seconds").dense.id for timed in (a, b)]
    runtimes = [Config.build(nested(timed)).runtime for timed in (a, b)]
    assert (ids[0] == ids[1]) == (runtimes[0] == runtimes[1])
    assert planned(a, "seconds", machine=MACHINE | {"cores": 3}).dense.id != planned(a, "seconds").dense.id


@pytest.mark.parametrize("kind", ["seconds", "flops", "tokens", "steps"])
def test_dtype_budget_kind_and_corpus_always_count(kind: str) -> None:
    ids = [planned({"runtime.dtype": dtype}, kind).dense.id for dtype in ("fp32", "bf16", "auto")]
    ids += [planned({}, other).dense.id for other in ("seconds", "flops", "tokens", "steps") if other != kind]
    ids.append(planned({}, kind, data="another").dense.id)
    assert len(set(ids)) == len(ids)


@given(settings(COUNTED, UNCOUNTED, TIMED), st.data())
def test_a_default_that_is_written_out_does_not_count(flat: dict[str, Any], data: st.DataObject) -> None:
    config = Config.build(nested(flat))
    whole = dataclasses.asdict(config)
    groups = data.draw(st.sets(st.sampled_from(["task", "model", "optimizer", "evaluation", "checkpoint", "runtime"])))
    spelled = nested(flat) | {group: whole[group] for group in groups}
    assert plan(Config.build(spelled), "d", MACHINE) == plan(config, "d", MACHINE)


#: Settings, and what version 0 named the run, the stages of prune30+quant4 and the two points.
KNOWN: list[tuple[dict[str, Any], str]] = [
    ({"data": TEXT, "budget": {"kind": "steps"}},
     "mlm-d12-w768-steps600-s0-037433f0 prune15-1ca062e6 prune30-91521409 quant4-2b867806 50a753c8 cfaa455c"),
    ({"data": TEXT, "evaluation": {"test_sequences": 9, "validation_sequences": 8},
      "optimizer": {"batch_size": 8, "schedule": "wsd"}, "model": {"depth": 2, "width": 64, "positions": "rotary"}},
     "mlm-d2-w64-seconds600-s0-6cbcedc9 prune15-c9e675f5 prune30-78ea953d quant4-28e84e7a dd35c44d 8c560984"),
    ({"task": {"name": "classification"}, "data": {"name": "rotten_tomatoes"}, "pretrain": {},
      "budget": {"kind": "epochs", "value": 3}},
     "rotten_tomatoes-d12-w768-epochs3-s0-db33bd2e prune15-06637289 prune30-89d18992 quant4-aa745522 618803c3 "
     "e4be6de0"),
]  # fmt: skip


@pytest.mark.parametrize("values, names", KNOWN)
def test_runs_that_stand_keep_their_names(values: dict[str, Any], names: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """But where a stage's version is raised."""
    monkeypatch.setattr("train_then_compress.records.SCHEMA", {})
    config = Config.build(values | {"recipes": ["none", "prune30+quant4"]})
    found = plan(config, "d", MACHINE, "o" if config.pretrain is not None else None)
    stages = [key.directory for key in found.recipes["prune30+quant4"]]
    assert " ".join([found.run_name, *stages, *(point[:8] for point in found.points.values())]) == names


def test_a_tasks_own_version_is_of_its_dense_stages_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    translator = Config.build({
        "task": {"name": "translation"}, "data": {"name": "debian_pairs"}, "model": {"name": "transformer"},
    })  # fmt: skip
    masked_lm = Config.build({"data": TEXT})

    def ids(schema: dict[str, int]) -> tuple[str, str]:
        monkeypatch.setattr("train_then_compress.records.SCHEMA", schema)
        return plan(translator, "d", MACHINE).dense.id, plan(masked_lm, "d", MACHINE).dense.id

    before, after = ids({"pretrain": 2}), ids({"pretrain": 2, "pretrain translation": 3})
    assert before[0] != after[0] and before[1] == after[1]
    assert ids({"pretrain": 3})[0] == after[0]


def test_what_bleu_depends_on_counts_for_points_but_not_for_training() -> None:
    def made(**evaluation: Any) -> Plan:
        values = {"task": {"name": "translation"}, "data": {"name": "debian_pairs"}, "model": {"name": "transformer"},
                  "recipes": ["none", "prune30"], "evaluation": evaluation}  # fmt: skip
        return plan(Config.build(values), "d", MACHINE)

    first = made()
    assert first.run_name.startswith("mt-d6-w512-seconds600-s0-")
    for setting, value in {"beam": 1, "length_penalty": 0.6, "max_ratio": 2.0, "max_extra": 20}.items():
        other = made(**{setting: value})
        assert other.dense == first.dense and not set(other.points.values()) & set(first.points.values()), setting
    for setting in ("validation_beam", "bleu_sentences"):  # what recovery looks at
        other = made(**{setting: 2})
        assert other.points["none"] == first.points["none"] and other.points["prune30"] != first.points["prune30"]


@given(settings(COUNTED))
def test_what_is_the_settings_that_differ_from_their_defaults(flat: dict[str, Any]) -> None:
    config = Config.build(nested(flat))
    given_here = {key.split(".")[1]: value for key, value in flat.items() if key.startswith("optimizer.")}
    assert what(config.optimizer) == {"is": "OptimizerConfig", **given_here}


def test_a_field_added_later_orphans_nothing() -> None:
    def kind(later: bool) -> Any:
        class Inner:
            __annotations__ = {"depth": int} | ({"colour": Literal["red", "blue"]} if later else {})
            depth = 3
            colour = "red"

        class Outer:
            __annotations__ = {"inner": Any, "rate": float} | ({"tags": list[str]} if later else {})
            inner = Field(default_factory=config_dataclass(Inner))
            rate = 0.5
            tags = Field(default_factory=list)

        return config_dataclass(Outer)

    for values in ({}, {"rate": 0.7}):
        assert digest(what(kind(False)(**values))) == digest(what(kind(True)(**values)))
    assert digest(what(kind(True)(tags=["a"]))) != digest(what(kind(True)()))


METHODS = [
    "quant4", "kmeans4", "gptq4", "smooth8", "lsq4", "prune60", "oneshot60", "gradual60", "wanda60", "semi50",
    "structured50", "svd50", "distill", "structured30+distill+prune30+quant8",
]  # fmt: skip
CHANGED = {
    "structured": {"units": ["layers"], "scope": "global"}, "svd": {"embeddings": True}, "distill": {"hints": "hidden"},
    "prune": {"recovery": {"distill": True}},
}  # fmt: skip
FINETUNED = {"task": {"name": "classification"}, "data": {"name": "rotten_tomatoes"}, "pretrain": {}}


@pytest.mark.parametrize(
    "values, expected",
    [
        ({"recipes": METHODS}, "788febb5b49a7d75"),
        ({"recipes": METHODS, "steps": CHANGED}, "cdba52c6b8319e26"),
        (FINETUNED | {"recipes": [*METHODS, "movement60", "exit90"]}, "806d7edd5089d704"),
    ],
    ids=["mlm", "other settings", "classification"],
)
def test_stages_and_points_have_the_identities_that_they_had_before_translation(
    values: dict[str, Any], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of them in one hash, taken from the last version that knew no translators; but where a version is raised."""
    monkeypatch.setattr("train_then_compress.records.SCHEMA", {})
    made = plan(Config.build({"budget": {"kind": "steps", "value": 100}, **values}), "data", {})
    stages = [key.id for chain in made.recipes.values() for key in chain]
    assert digest([made.dense.id, *stages, *made.points.values()])[:16] == expected


# Recipes.


def chains(flat: dict[str, Any], *recipes: str) -> dict[str, list[str]]:
    return {
        name: [key.id for key in chain] for name, chain in planned({**flat, "recipes": list(recipes)}).recipes.items()
    }


def test_iterative_pruning_is_one_chain_of_six_stages() -> None:
    recipes = [f"prune{sparsity}" for sparsity in (15, 30, 45, 60, 75, 90)]
    plan_ = planned({"recipes": recipes})
    chain = plan_.recipes["prune90"]
    assert [key.name for key in chain] == recipes and len({key.id for key in chain}) == 6
    for length, recipe in enumerate(recipes, start=1):
        assert plan_.recipes[recipe] == chain[:length]
    for parent, key in zip([plan_.dense, *chain], chain, strict=False):
        assert key.parent == parent and key.directory == f"{key.name}-{key.id[:8]}"


def test_prune_then_quantize_shares_the_pruning() -> None:
    ids = chains({}, "prune60", "prune60+quant4", "prune60+quant8", "quant4", "prune50", "oneshot60")
    assert ids["prune60+quant4"][:-1] == ids["prune60+quant8"][:-1] == ids["prune60"]
    assert ids["prune60+quant4"][-1] not in {ids["prune60+quant8"][-1], ids["quant4"][-1]}
    assert ids["prune50"][:3] == ids["prune60"][:3] and ids["prune50"][3] != ids["prune60"][3]
    assert len(ids["oneshot60"]) == 1 and ids["oneshot60"][0] not in ids["prune60"]


@given(st.lists(st.sampled_from(["none", "quant4", "prune30", "prune45+quant8", "oneshot60"]), min_size=1, unique=True))
def test_a_recipes_stages_and_point_do_not_depend_on_the_other_recipes(recipes: list[str]) -> None:
    together, name = planned({"recipes": recipes}), planned({}).run_name
    for recipe in recipes:
        alone = planned({"recipes": [recipe]})
        assert alone.recipes[recipe] == together.recipes[recipe] and alone.points[recipe] == together.points[recipe]
    assert len(set(together.points.values())) == len(recipes) and together.run_name == name


@pytest.mark.parametrize(
    "recipe, change, counts",
    [
        ("quant4", {"steps": {"quant": {"group_size": 16}}}, True),
        ("quant4", {"steps": {"quant": {"group_size": 32}}}, False),
        ("quant4", {"steps": {"prune": {"scope": "global"}}}, False),
        ("prune30", {"steps": {"quant": {"group_size": 16}}}, False),
        ("prune30", {"steps": {"prune": {"recovery": {"max_steps": 7}}}}, True),
        ("prune30", {"steps": {"prune": {"recovery": {"max_steps": 200}}}}, False),
        ("prune30", {"steps": {"oneshot": {"recovery": {"max_steps": 7}}}}, False),
        ("prune30", {"evaluation.validation_sequences": 5}, True),
        ("prune30", {"evaluation.test_sequences": 5}, False),
        ("prune30", {"seed": 1}, True),
    ],
)
def test_a_methods_settings_count_for_its_stages_alone(recipe: str, change: dict[str, Any], counts: bool) -> None:
    assert (chains({}, recipe) != chains(change, recipe)) == counts


def test_test_sequences_count_for_points_alone() -> None:
    few, all_ = (planned({"evaluation.test_sequences": count, "recipes": ["none", "quant4"]}) for count in (5, 0))
    assert few.recipes == all_.recipes and few.dense == all_.dense
    assert not set(few.points.values()) & set(all_.points.values())


FINETUNING = {
    "task.name": "classification",
    "data": {"name": "rotten_tomatoes"},
    "pretrain": {},
    "budget.kind": "epochs",
}


def finetuning(flat: dict[str, Any], origin: str = "o") -> Plan:
    values = nested({key: value for key, value in (FINETUNING | flat).items() if key != "data"})
    return plan(Config.build(values | {"data": FINETUNING["data"]}), "d", MACHINE, origin)


def test_a_finetuning_is_known_by_its_origin_its_data_and_its_settings() -> None:
    ids = [finetuning({}).dense.id, finetuning({}, "other").dense.id]
    ids += [finetuning({key: value}).dense.id for key, value in
            {"task.dropout": 0.2, "seed": 1, "optimizer.lr": 0.1, "budget.value": 3}.items()]  # fmt: skip
    assert len(set(ids)) == len(ids)
    assert finetuning({"pretrain": {"seed": 3}}).dense.id == ids[0]  # that is for the origin to say
    name = finetuning({"budget.value": 3}).run_name
    assert name.startswith("rotten_tomatoes-d12-w768-epochs3-s0-") and finetuning({}).dense.name == "finetune"


def test_a_taught_run_is_known_by_its_teacher_wherever_that_lies() -> None:
    def taught(teacher: str, place: str = "runs/x", **settings: Any) -> str:
        config = Config.build(nested({"distill": {"teacher": place, **settings}}))
        return plan(config, "d", MACHINE, teacher_id=teacher).dense.id

    ids = [
        planned({}, "seconds").dense.id,
        taught("a"),
        taught("b"),
        taught("a", alpha=0.2),
        taught("a", hints="hidden"),
    ]
    assert len(set(ids)) == len(ids) and taught("a", "runs/y") == taught("a", temperature=2.0) == ids[1]


def test_a_milestone_is_known_by_its_origin() -> None:
    config = Config.build(nested({"init_from": "runs/x@0.5", "budget.kind": "steps"}))
    first, second = (plan(config, "d", MACHINE, origin) for origin in ("a", "b"))
    assert first.dense.name == "milestone" and first.dense.id != second.dense.id
    assert first.run_name.startswith("mlm-d12-w768-steps600@0.5-s0-")
    whole = Config.build(nested({"init_from": "runs/mlm-d1", "budget.kind": "steps"}))
    assert plan(whole, "d", MACHINE, "a").run_name.startswith("mlm-d12-w768-steps600-s0-")


def test_run_names_have_one_form() -> None:
    name = planned({"model.depth": 6, "model.width": 256, "budget.value": 600}, "seconds").run_name
    assert name[:-8] == "mlm-d6-w256-seconds600-s0-" and len(name) == len("mlm-d6-w256-seconds600-s0-") + 8
    assert planned({"budget.value": 1e14, "seed": 3}, "flops").run_name.startswith("mlm-d12-w768-flops1e14-s3-")
    assert planned({"budget.value": 0.5}, "seconds").run_name.startswith("mlm-d12-w768-seconds0.5-s0-")


# Files.

ROWS = st.lists(
    st.dictionaries(
        st.text(max_size=4), st.one_of(st.text(max_size=8), st.floats(allow_nan=False), st.none()), max_size=3
    )
)


@given(rows=ROWS, share=st.floats(0, 1), later=ROWS)
def test_a_torn_line_loses_itself_and_nothing_else(
    tmp_path_factory: pytest.TempPathFactory, rows: list[Any], share: float, later: list[Any]
) -> None:
    path = tmp_path_factory.mktemp("rows") / "deep" / "rows.jsonl"
    assert read_rows(path) == []
    for row in rows:
        append_row(path, row)
    assert read_rows(path) == rows
    whole = path.read_bytes() if rows else b""
    cut = int(share * len(whole))
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(whole[:cut])
    kept = [row for i, row in enumerate(rows) if cut >= len("\n".join(json.dumps(r) for r in rows[: i + 1]))]
    assert read_rows(path) == kept
    for row in later:
        append_row(path, row)
    assert read_rows(path) == kept + later
    rewrite_rows(path, later)
    assert read_rows(path) == later


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"state": "old"})
    for failing in ("fsync", "replace"):

        def fail(*arguments: object) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as patched:
            patched.setattr(*((os, "fsync") if failing == "fsync" else (Path, "replace")), fail)
            with pytest.raises(OSError, match="No space left"):
                write_json(path, {"state": "new"})
        assert read_json(path) == {"state": "old"} and list(tmp_path.iterdir()) == [path]
    atomic_write(path, b'{"state": "new"}')
    assert read_json(path) == {"state": "new"} and list(tmp_path.iterdir()) == [path]


def test_a_killed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write_json(path, {"state": "old"})
    code = (
        "import os, sys; from pathlib import Path; from train_then_compress.records import write_json\n"
        "os.fsync = lambda descriptor: os._exit(9)\nwrite_json(Path(sys.argv[1]), {'state': 'new'})"
    )
    assert subprocess.run([sys.executable, "-c", code, str(path)]).returncode == 9
    assert read_json(path) == {"state": "old"}


def test_a_second_process_finds_the_run_directory_busy(tmp_path: Path) -> None:
    code = (
        "import sys; from pathlib import Path; from train_then_compress.records import RunDirectory\n"
        "with RunDirectory(Path(sys.argv[1])).locked(): print('in', flush=True); input()"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "run")]
    directory = RunDirectory(tmp_path / "run")
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdin and holder.stdout and holder.stdout.readline() == "in\n"
        with (
            pytest.raises(Busy, match="run is being worked on by another process; wait for it or stop it"),
            directory.locked(),
        ):
            pass
        holder.communicate("\n")
    with directory.locked():
        refused = subprocess.run(command, capture_output=True, text=True, input="\n")
    assert refused.returncode != 0 and "is being worked on by another process" in refused.stderr


def test_the_config_beside_a_run_is_read_back(tmp_path: Path) -> None:
    flat = {key: values[-1] for key, values in (COUNTED | UNCOUNTED | TIMED).items()}
    config = Config.build(nested(flat))
    RunDirectory(tmp_path).write_config(config)
    assert Config.load(tmp_path / "config.yaml") == config


def test_a_run_is_done_when_every_point_asked_for_stands(tmp_path: Path) -> None:
    directory = RunDirectory(tmp_path)
    small, large = planned({"recipes": ["none"]}), planned({"recipes": ["none", "quant4"]})
    for loss in (2.0, 1.0):
        assert not directory.is_done(small)
        append_row(tmp_path / "points.jsonl", {"point": small.points["none"], "recipe": "none", "loss": loss})
    assert not directory.is_done(small)
    write_json(tmp_path / "result.json", {"points": small.points})
    assert directory.is_done(small) and not directory.is_done(large)
    assert [row["loss"] for row in directory.points().values()] == [1.0]
    append_row(tmp_path / "points.jsonl", {"point": large.points["quant4"], "recipe": "quant4", "loss": 1.5})
    assert directory.is_done(large)
