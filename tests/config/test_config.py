"""Every wrong setting is refused in words that name the key, the value and what is allowed; every YAML file fits."""

from __future__ import annotations

import dataclasses
import itertools
from pathlib import Path
from typing import Any, get_args

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf

from train_then_compress.config import (
    Config,
    ConfigError,
    DataConfig,
    DistillConfig,
    LabelledCorpora,
    ParallelCorpora,
    RobertaConfig,
    TaskConfig,
    TransformerConfig,
    conf_directory,
    parse_recipe,
)
from train_then_compress.config.steps import STEPS, OneShot, Prune, Quant
from train_then_compress.sweep import corpora_of, own_groups

CONF = conf_directory()
TEXT = {"name": "text_files", "train": "corpus.txt"}
BRANCH = {"optimizer": {"schedule": "wsd"}}

# (settings, what the error must contain): at least the key, the value and what is allowed.
RANGES: list[tuple[dict[str, Any], str]] = [
    ({"seed": -1}, "seed=-1: must be greater than or equal to 0"),
    ({"seed": 2**31}, f"seed={2**31}: must be less than {2**31}"),
    ({"seed": 1.5}, "seed=1.5: must be a valid integer"),
    ({"task": {"name": "mlm", "mask_rate": 0.1}}, "task.mask_rate=0.1: must be greater than or equal to 0.15"),
    ({"task": {"name": "mlm", "mask_rate": 0.95}}, "task.mask_rate=0.95: must be less than or equal to 0.9"),
    ({"data": TEXT | {"vocab_size": 299}}, "data.vocab_size=299: must be greater than or equal to 300"),
    ({"data": TEXT | {"vocab_size": 10**7}}, "data.vocab_size=10000000: must be less than or equal to 1000000"),
    ({"data": TEXT | {"sequence_length": 7}}, "data.sequence_length=7: must be greater than or equal to 8"),
    ({"data": TEXT | {"sequence_length": 8193}}, "data.sequence_length=8193: must be less than or equal to 8192"),
    ({"data": TEXT | {"fraction": 0}}, "data.fraction=0: must be greater than 0"),
    ({"data": TEXT | {"fraction": 1.1}}, "data.fraction=1.1: must be less than or equal to 1"),
    ({"model": {"depth": 0}}, "model.depth=0: must be greater than or equal to 1"),
    ({"model": {"depth": 49}}, "model.depth=49: must be less than or equal to 48"),
    ({"model": {"depth": "deep"}}, "model.depth='deep': must be a valid integer"),
    ({"model": {"width": 1}}, "model.width=1: must be greater than or equal to 2"),
    ({"model": {"width": 16385}}, "model.width=16385: must be less than or equal to 16384"),
    ({"model": {"head_size": 1}}, "model.head_size=1: must be greater than or equal to 2"),
    ({"model": {"dropout": 1}}, "model.dropout=1: must be less than 1"),
    ({"model": {"dropout": -0.1}}, "model.dropout=-0.1: must be greater than or equal to 0"),
    ({"budget": {"value": 0}}, "budget.value=0: must be greater than 0"),
    ({"budget": {"value": float("inf")}}, "budget.value=inf: must be a finite number"),
    ({"optimizer": {"lr": 0}}, "optimizer.lr=0: must be greater than 0"),
    ({"optimizer": {"lr": 2}}, "optimizer.lr=2: must be less than or equal to 1"),
    ({"optimizer": {"lr": float("nan")}}, "optimizer.lr=nan: must be a finite number"),
    ({"optimizer": {"beta1": 1}}, "optimizer.beta1=1: must be less than 1"),
    ({"optimizer": {"beta2": -0.5}}, "optimizer.beta2=-0.5: must be greater than or equal to 0"),
    ({"optimizer": {"eps": 0}}, "optimizer.eps=0: must be greater than 0"),
    ({"optimizer": {"weight_decay": -1}}, "optimizer.weight_decay=-1: must be greater than or equal to 0"),
    ({"optimizer": {"clip": 0}}, "optimizer.clip=0: must be greater than 0"),
    ({"optimizer": {"batch_size": 0}}, "optimizer.batch_size=0: must be greater than or equal to 1"),
    ({"optimizer": {"warmup": 1}}, "optimizer.warmup=1: must be less than 1"),
    ({"optimizer": {"cooldown": 0}}, "optimizer.cooldown=0: must be greater than 0"),
    ({"evaluation": {"points": 0}}, "evaluation.points=0: must be greater than or equal to 1"),
    ({"evaluation": {"points": 1001}}, "evaluation.points=1001: must be less than or equal to 1000"),
    ({"evaluation": {"first": 0}}, "evaluation.first=0: must be greater than 0"),
    ({"evaluation": {"first": 1.5}}, "evaluation.first=1.5: must be less than or equal to 1"),
    ({"evaluation": {"batch_size": 0}}, "evaluation.batch_size=0: must be greater than or equal to 1"),
    ({"evaluation": {"test_sequences": -1}}, "evaluation.test_sequences=-1: must be greater than or equal to 0"),
    ({"checkpoint": {"every_seconds": -1}}, "checkpoint.every_seconds=-1: must be greater than or equal to 0"),
    ({"checkpoint": {"keep_at": ["half"]}}, "checkpoint.keep_at.0='half': must be a valid number"),
    ({"runtime": {"threads": -1}}, "runtime.threads=-1: must be greater than or equal to 0"),
    ({"runtime": {"processes": 0}}, "runtime.processes=0: must be greater than or equal to 1"),
    ({"runtime": {"micro_batch": -2}}, "runtime.micro_batch=-2: must be greater than or equal to 0"),
    ({"recipes": "none"}, "recipes='none': must be a valid list"),
]
ENUMERATIONS: list[tuple[dict[str, Any], str]] = [
    ({"task": {"name": "clm"}}, "task.name='clm': must be one of 'mlm', 'classification', 'translation'"),
    ({"model": {"name": "lstm"}}, "model.name='lstm': must be one of 'roberta', 'transformer'"),
    ({"model": {"name": "transformer", "encoder_depth": 0}}, "model.encoder_depth=0: must be greater than or equal"),
    ({"model": {"name": "transformer", "colour": 1}}, "model.colour=1: there is no such setting"),
    ({"data": {"name": "web"}}, "data.name='web': must be one of 'sotu_wiki', 'debian_docs'"),
    ({"data": TEXT | {"document": "line"}}, "data.document='line': must be 'block' or 'file'"),
    ({"model": {"positions": "none"}}, "model.positions='none': must be 'learned', 'sinusoidal' or 'rotary'"),
    ({"model": {"norm": "both"}}, "model.norm='both': must be 'pre' or 'post'"),
    (
        {"budget": {"kind": "hours"}},
        "budget.kind='hours': must be 'seconds', 'flops', 'tokens', 'steps' or 'epochs'",
    ),
    ({"optimizer": {"schedule": "cosine"}}, "optimizer.schedule='cosine': must be 'linear', 'wsd' or 'inverse_sqrt'"),
    ({"runtime": {"device": "tpu"}}, "runtime.device='tpu': must be 'cpu' or 'cuda'"),
    ({"runtime": {"dtype": "fp16"}}, "runtime.dtype='fp16': must be 'auto', 'fp32' or 'bf16'"),
    ({"tracker": {"name": "mlflow"}}, "tracker.name='mlflow': must be 'none' or 'wandb'"),
    ({"tracker": {"mode": "on"}}, "tracker.mode='on': must be 'offline', 'online' or 'disabled'"),
    ({"model": {"dpeth": 3}}, "model.dpeth=3: there is no such setting"),
    ({"colour": "red"}, "colour='red': there is no such setting"),
]
COMBINATIONS: list[tuple[dict[str, Any], str]] = [
    ({"study": "a/b"}, "study='a/b': letters, digits"),
    ({"study": ".hidden"}, "study='.hidden': letters, digits, '.', '_' and '-' only, not starting with '.'"),
    ({"study": ""}, "study='': letters"),
    ({"data": {"name": "text_files"}}, "data.train=None: a file, folder or glob of text is needed"),
    ({"model": {"width": 100, "head_size": 64}}, "model.width=100: must be a multiple of model.head_size=64"),
    ({"model": {"width": 15, "head_size": 5, "positions": "rotary"}}, "model.head_size=5: rotary positions need"),
    ({"model": {"width": 63, "positions": "rotary"}}, "model.head_size=63: rotary positions need an even head size"),
    ({"model": {"width": 63, "positions": "sinusoidal"}}, "model.width=63: sinusoidal positions need an even width"),
    ({"budget": {"kind": "steps", "value": 10.5}}, "budget.value=10.5: a budget in steps must be a whole number"),
    ({"budget": {"kind": "steps", "value": 1}}, "budget.value=1.0: too small for optimizer.warmup=0.06: no step"),
    ({"optimizer": {"schedule": "wsd", "warmup": 0.6, "cooldown": 0.5}},
     "optimizer.warmup=0.6: with optimizer.cooldown=0.5 at most 1 together"),
    ({"optimizer": {"batch_size": 9}, "runtime": {"processes": 2}},
     "optimizer.batch_size=9: must be a multiple of runtime.processes=2"),
    ({"optimizer": {"batch_size": 8}, "runtime": {"processes": 2, "micro_batch": 3}},
     "runtime.micro_batch=3: must divide the 4 sequences of one process"),
    ({"optimizer": {"schedule": "inverse_sqrt", "warmup": 0}}, "optimizer.warmup=0.0: optimizer.schedule=inverse_sqrt"),
    ({"task": {"name": "translation"}}, "data=sotu_wiki: text without labels or translations; it needs task=mlm, and "
     "task=translation other data, e.g. data=debian_en_it"),
    ({"data": {"name": "debian_pairs"}}, "data=debian_pairs: sentence pairs; it needs task=translation"),
    ({"task": {"name": "translation"}, "data": {"name": "debian_pairs"}},
     "model.name=roberta: task=translation needs model=transformer"),
    ({"model": {"name": "transformer"}}, "model.name=transformer: task=mlm needs model=roberta"),
    ({"task": {"name": "translation"}, "data": {"name": "debian_pairs"}, "model": {"name": "transformer"},
      "budget": {"kind": "epochs"}}, "budget.kind=epochs: only task=classification counts epochs"),
    ({"checkpoint": {"keep_at": [0.5, 1.0]}}, "checkpoint.keep_at=1.0: each progress must lie between 0 and 1"),
    ({"distill": {}}, "distill.teacher=None: the directory of a finished run is needed"),
    ({"distill": {"teacher": "runs/a"}, "init_from": "runs/b"}, "distill.teacher=runs/a: nothing is trained here"),
    ({"distill": {"teacher": "runs/a", "alpha": 2}}, "distill.alpha=2: must be less than or equal to 1"),
    ({"distill": {"teacher": "runs/a", "hints": "all"}}, "distill.hints='all': must be 'none', 'hidden' or"),
    ({"paths": {"runs": ""}}, "paths.runs='': a directory is needed"),
    ({"paths": {"cache": ""}}, "paths.cache='': a directory is needed"),
    ({"recipes": []}, "recipes=[]: at least one recipe"),
    ({"branch_from": "runs/a@0.5"}, "branch_from=runs/a@0.5: only optimizer.schedule=wsd can branch"),
    (BRANCH | {"branch_from": "runs/a"}, "branch_from=runs/a: expected RUN_DIRECTORY@PROGRESS"),
    (BRANCH | {"branch_from": "runs/a@half"}, "branch_from=runs/a@half: expected RUN_DIRECTORY@PROGRESS"),
    (BRANCH | {"branch_from": "runs/a@1.0"}, "branch_from=runs/a@1.0: expected RUN_DIRECTORY@PROGRESS"),
    (BRANCH | {"branch_from": "@0.5"}, "branch_from=@0.5: expected RUN_DIRECTORY@PROGRESS"),
]  # fmt: skip
RECIPES: list[tuple[dict[str, Any], str]] = [
    ({"recipes": ["quant5"]}, "recipes: quant5: bits must be one of 8, 6, 4, 3, 2"),
    ({"recipes": ["prune0"]}, "recipes: pruning 0 %: must lie between 1 and 99 per cent"),
    ({"recipes": ["prune100"]}, "recipes: pruning 100 %: must lie between 1 and 99 per cent"),
    ({"recipes": ["oneshot100"]}, "recipes: pruning 100 %: must lie between 1 and 99 per cent"),
    ({"recipes": ["none", "squash4"]}, "'squash4': unknown method 'squash'; known are " + ", ".join(sorted(STEPS))),
    ({"recipes": ["quant"]}, "recipes: 'quant': 'quant' is not a method and a strength such as quant4"),
    ({"recipes": ["quant4"], "task": {"name": "classification"}}, "data=sotu_wiki: text without labels"),
    ({"data": {"name": "rotten_tomatoes"}}, "data=rotten_tomatoes: labelled text"),
    ({"data": {"name": "debian_sections", "sections": ["web"]}}, "data.sections=['web']"),
    ({"data": {"name": "csv_files"}}, "data.train=None: a CSV file with the columns text and label is needed"),
    ({"checkpoint": {"keep_at_perplexity": [1.0]}}, "checkpoint.keep_at_perplexity=1.0: a perplexity is greater"),
    ({"recipes": ["4quant"]}, "'4quant' is not a method and a strength"),
    ({"recipes": ["prune60+"]}, "recipes: 'prune60+': '' is not a method and a strength"),
    ({"recipes": ["none+quant4"]}, "unknown method 'none'"),
    ({"recipes": ["prune60 + quant4"]}, "'prune60 ' is not a method and a strength"),
    ({"recipes": ["quant4+prune60"]}, "recipes: 'quant4+prune60': quant4 must be the last step"),
    ({"recipes": ["prune60+prune30"]}, "'prune60+prune30': prune30 must prune more than prune60 before it"),
    ({"recipes": ["quant4"], "steps": {"quant": {"group_size": 1}}},
     "steps.quant.group_size=1: must be greater than or equal to 2"),
    ({"recipes": ["quant4"], "steps": {"quant": {"granularity": "row"}}},
     "steps.quant.granularity='row': must be 'tensor', 'channel' or 'group'"),
    ({"recipes": ["quant4"], "model": {"width": 96, "head_size": 32}, "steps": {"quant": {"group_size": 64}}},
     "steps.quant.group_size=64: must divide the matrices' inputs (model.width=96 and 4 x that)"),
    ({"recipes": ["quant4"], "model": {"width": 32, "head_size": 32}, "steps": {"quant": {"group_size": 48}}},
     "steps.quant.group_size=48: must divide the matrices' inputs (model.width=32 and 4 x that)"),
    ({"recipes": ["quant4"], "steps": {"quant": {"bits": 3}}}, "steps.quant.bits=3: there is no such setting"),
    ({"recipes": ["prune30"], "steps": {"prune": {"increment": 0}}},
     "steps.prune.increment=0: must be greater than or equal to 1"),
    ({"recipes": ["prune30"], "steps": {"prune": {"scope": "model"}}},
     "steps.prune.scope='model': must be 'layer' or 'global'"),
    ({"recipes": ["prune30"], "steps": {"prune": {"recovery": {"target": 0}}}},
     "steps.prune.recovery.target=0: must be greater than 0"),
    ({"recipes": ["oneshot30"], "steps": {"oneshot": {"recovery": {"check_every": 0}}}},
     "steps.oneshot.recovery.check_every=0: must be greater than or equal to 1"),
    ({"recipes": ["prune30"], "steps": {"prune": {"recovery": {"max_steps": -1}}}},
     "steps.prune.recovery.max_steps=-1: must be greater than or equal to 0"),
    ({"recipes": ["prune30"], "steps": {"prune": {"recovery": {"lr_factor": 11}}}},
     "steps.prune.recovery.lr_factor=11: must be less than or equal to 10"),
]  # fmt: skip


@pytest.mark.parametrize(
    "settings, words", RANGES + ENUMERATIONS + COMBINATIONS + RECIPES, ids=lambda value: str(value)[:70]
)
def test_a_wrong_setting_is_refused_in_words(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as error:
        Config.build(settings)
    assert words in str(error.value) and "pydantic" not in str(error.value)


def test_every_mistake_is_said_at_once() -> None:
    with pytest.raises(ConfigError) as error:
        Config.build({"model": {"depth": 0, "norm": "x"}, "optimizer": {"lr": -1}})
    keys = [line.split("=")[0] for line in str(error.value).splitlines()]
    assert keys == ["model.depth", "model.norm", "optimizer.lr"]


def test_only_the_methods_used_are_validated() -> None:
    steps = {"quant": {"group_size": 1}, "prune": {"scope": "global"}}
    config = Config.build({"recipes": ["none", "prune30"], "steps": steps})
    assert config.parsed_recipes()["prune30"][0].config == Prune(scope="global")


def test_a_config_cannot_be_changed() -> None:
    config = Config.build({})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.model.depth = 3  # type: ignore[misc]
    assert config.model.depth == 12


@given(st.integers(1, 300), st.integers(2, 80))
def test_heads_are_width_over_head_size_and_at_least_one(width: int, head_size: int) -> None:
    if width < 2 or (width > head_size and width % head_size):
        with pytest.raises(ConfigError):
            Config.build({"model": {"width": width, "head_size": head_size}})
        return
    model = RobertaConfig(width=width, head_size=head_size)
    assert model.heads >= 1 and width % model.heads == 0
    assert model.heads * head_size == width or (model.heads == 1 and width <= head_size)


def test_recipes_are_methods_with_strengths() -> None:
    steps = parse_recipe("prune15+oneshot60+quant4", {"quant": {"group_size": 16}}, RobertaConfig())
    assert [step.name for step in steps] == ["prune15", "oneshot60", "quant4"]
    assert [step.config for step in steps] == [Prune(), OneShot(), Quant(group_size=16)]
    assert parse_recipe("none", {}, RobertaConfig()) == []


@given(
    st.lists(st.integers(1, 99), min_size=1, max_size=3, unique=True).map(sorted),
    st.sampled_from([None, 8, 6, 4, 3, 2]),
    st.sampled_from(["prune", "oneshot"]),
)
def test_every_recipe_of_the_grammar_is_read_back(sparsities: list[int], bits: int | None, method: str) -> None:
    names = [f"{method}{sparsity}" for sparsity in sparsities] + ([f"quant{bits}"] if bits else [])
    recipe = "+".join(names)
    config = Config.build({"recipes": ["none", recipe, recipe]})
    parsed = config.parsed_recipes()
    assert list(parsed) == ["none", recipe] and "+".join(step.name for step in parsed[recipe]) == recipe


@given(st.integers(1, 99), st.integers(1, 99))
def test_increments_rise_to_the_strength_and_are_shared(strength: int, increment: int) -> None:
    chain = Prune(increment=increment).increments(strength)
    assert chain[-1] == strength and chain == sorted(set(chain))
    assert all(value % increment == 0 for value in chain[:-1])
    assert max(b - a for a, b in itertools.pairwise([0, *chain])) <= increment
    assert OneShot(increment=increment).increments(strength) == [strength]


# The YAML files.


def dataclass_of(group: str, values: dict[str, Any]) -> type:
    """The dataclass that a file of a group is read into."""
    if group in ("data", "task"):
        choices = get_args(get_args(DataConfig if group == "data" else TaskConfig)[0])
        return next(choice for choice in choices if choice.__pydantic_fields__["name"].default == values["name"])
    if group == "model":
        return {"roberta": RobertaConfig, "transformer": TransformerConfig}[values["name"]]
    return DistillConfig if group == "distill" else type(getattr(Config.build({}), group))


def yaml_files(*groups: str) -> list[Any]:
    paths = (path for path in CONF.glob("*/*.yaml") if not groups or path.parent.name in groups)
    return [pytest.param(path, id=f"{path.parent.name}/{path.stem}") for path in sorted(paths)]


#: The data files of classification and of translation, and what makes any of them a valid config.
LABELLED, PARALLEL = corpora_of(LabelledCorpora), corpora_of(ParallelCorpora)
FINETUNING = ["task=classification", "data=rotten_tomatoes", "pretrain=mlm"]
TRANSLATION = ["task=translation", "data=debian_en_it", "model=transformer"]

GROUPS = sorted(
    {path.name for path in CONF.iterdir()}
    & {field.name for field in dataclasses.fields(Config)} - {"steps", "pretrain"}
)


@pytest.mark.parametrize("path", yaml_files(*GROUPS))
def test_a_group_file_has_the_keys_of_its_dataclass(path: Path) -> None:
    values = yaml.safe_load(path.read_text())
    kind = dataclass_of(path.parent.name, values)
    assert set(values) == {field.name for field in dataclasses.fields(kind)}


@pytest.mark.parametrize("path", yaml_files("steps"))
def test_a_step_file_has_the_keys_of_its_dataclass_and_its_defaults(path: Path) -> None:
    lines = path.read_text()
    assert lines.startswith(f"# @package steps.{path.stem}\n")
    values = yaml.safe_load(lines)
    assert values == dataclasses.asdict(STEPS[path.stem]())


def test_every_method_has_its_file_and_the_main_file_has_every_key() -> None:
    assert {path.stem for path in CONF.glob("steps/*.yaml")} == set(STEPS)
    values = yaml.safe_load((CONF / "run.yaml").read_text())
    groups = {group for entry in values.pop("defaults") if isinstance(entry, dict) for group in entry}
    values.pop("hydra")
    fields = {field.name for field in dataclasses.fields(Config)}
    assert (groups & fields) | set(values) == fields and not groups & set(values)


def composed(*overrides: str) -> dict[str, Any]:
    """What Hydra hands to the task function, without the node that `ttc run` drops."""
    with own_groups(), initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        values: Any = OmegaConf.to_container(compose("run", list(overrides)), resolve=True)
    values.pop("experiment", None)
    return dict(values)


def test_the_default_composition_is_the_default_config() -> None:
    config = Config.build(composed())
    assert dataclasses.replace(config, steps={}) == Config.build({})


@pytest.mark.parametrize("path", yaml_files(*GROUPS))
def test_a_group_file_composes_and_is_valid(path: Path) -> None:
    group = path.parent.name
    expected: Any = OmegaConf.to_container(OmegaConf.load(path))
    needed = []
    if path.stem in ("text_files", "csv_files", "parallel_files"):
        needed, expected["train"] = ["data.train=corpus.txt"], "corpus.txt"
    if path.stem == "fairseq_bin":
        needed, expected["path"] = ["data.path=data-bin"], "data-bin"
    if group == "distill":
        needed, expected["teacher"] = ["distill.teacher=runs/x"], "runs/x"
    if f"{group}={path.stem}" in FINETUNING or path.stem in LABELLED or path.stem == "epochs":
        needed += [override for override in FINETUNING if not override.startswith(f"{group}=")]
    if f"{group}={path.stem}" in TRANSLATION or path.stem in PARALLEL:
        needed += [override for override in TRANSLATION if not override.startswith(f"{group}=")]
    values = composed(f"{group}={path.stem}", *needed)
    assert values[group] == expected
    assert dataclasses.asdict(getattr(Config.build(values), group)) == expected


def test_what_fairseq_registers_with_hydra_is_no_part_of_ours() -> None:
    pytest.importorskip("fairseq")
    import fairseq.tasks  # noqa: F401

    config = Config.build(composed(*TRANSLATION))
    assert config.task.name == "translation" and config.model.name == "transformer"


def test_pretraining_takes_the_settings_of_a_masked_lm() -> None:
    """The groups of `pretrain` compose like those of a run of its own, which then has the same identity."""
    within = Config.build(composed(*FINETUNING, "data@pretrain.data=debian_docs", "pretrain.budget.value=5"))
    alone = Config.build(composed("data=debian_docs", "budget.value=5"))
    assert within.pretraining() == alone


def test_whatever_else_lies_there_is_laid_over_the_whole_config_by_an_experiment() -> None:
    """Such files are composed and validated with the experiments below."""
    experiments = [yaml.safe_load(path.read_text()) for path in CONF.glob("experiment/*.yaml")]
    named = [entry for values in experiments for entry in values.get("defaults", []) if isinstance(entry, dict)]
    for path in CONF.glob("*/*.yaml"):
        if path.parent.name not in (*GROUPS, "steps", "experiment", "pretrain"):
            assert path.read_text().startswith("# @package _global_\n")
            assert {f"/{path.parent.name}": path.stem} in named


def cells(experiment: str) -> list[list[str]]:
    """Every combination of the values that an experiment sweeps, as overrides."""
    with own_groups(), initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        whole = compose("run", [f"experiment={experiment}"], return_hydra_config=True)
    params = OmegaConf.to_container(whole.hydra.sweeper.params) if whole.hydra.sweeper.params else {}
    parser = OverridesParser.create()
    swept = [parser.parse_override(f"{key}={value}") for key, value in dict(params).items()]  # type: ignore[arg-type]
    values = [
        [f"{s.key_or_group}={v}" for v in s.sweep_string_iterator()] if s.is_sweep_override() else [s.input_line or ""]
        for s in swept
    ]
    return [list(cell) for cell in itertools.product(*values)]


@pytest.mark.parametrize("width", [32, 64, 256])
def test_at_cpu_scale_the_rate_falls_as_one_over_the_width(width: int) -> None:
    with own_groups(), initialize_config_dir(str(CONF), version_base="1.3"):
        whole = compose("run", ["+scale=cpu", f"model.width={width}"])
    assert whole.optimizer.lr == 0.32 / width


@pytest.mark.parametrize("path", yaml_files("experiment"))
def test_every_cell_of_an_experiment_composes_and_is_valid(path: Path) -> None:
    assert path.read_text().startswith("# @package _global_\n")
    shapes = set()
    for cell in cells(path.stem):
        config = Config.build(composed(f"experiment={path.stem}", *cell))
        assert config.study == path.stem
        shapes.add(repr(config))
    assert len(shapes) == len(cells(path.stem)) >= 1
