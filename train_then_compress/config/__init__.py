"""The config of a run as dataclasses, one per group of ``conf/``. Knows no torch."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Annotated, Any

import yaml
from omegaconf import OmegaConf
from pydantic import Field, TypeAdapter, ValidationError, model_validator

from train_then_compress.config.base import ConfigError, config_dataclass, explain, reject
from train_then_compress.config.data import BATCH_FIELDS, CorpusConfig, SotuWiki, TextConfig
from train_then_compress.config.distillation import DistillConfig, Teaching
from train_then_compress.config.labelled import LabelledConfig, LabelledCorpora
from train_then_compress.config.model import ModelConfig, RobertaConfig, TransformerConfig
from train_then_compress.config.origin import Milestone, Pretraining, parse_milestone
from train_then_compress.config.parallel import ParallelConfig, ParallelCorpora
from train_then_compress.config.recipes import Step, parse_recipe
from train_then_compress.config.runtime import PathsConfig, RuntimeConfig, TrackerConfig
from train_then_compress.config.steps import STEPS
from train_then_compress.config.training import (
    BudgetConfig,
    CheckpointConfig,
    ClassificationTask,
    EvaluationConfig,
    MaskedLMTask,
    OptimizerConfig,
    TranslationTask,
)

__all__ = [
    "BATCH_FIELDS", "BudgetConfig", "CheckpointConfig", "ClassificationTask", "Config", "ConfigError",
    "CorpusConfig", "DataConfig", "DistillConfig", "EvaluationConfig", "LabelledConfig", "LabelledCorpora",
    "MaskedLMTask", "Milestone", "ModelConfig", "OptimizerConfig", "ParallelConfig", "ParallelCorpora", "PathsConfig",
    "Pretraining", "RobertaConfig", "RuntimeConfig", "SotuWiki", "Step", "TaskConfig", "Teaching", "TrackerConfig",
    "TransformerConfig", "TranslationTask", "conf_directory", "corpus_files", "parse_milestone", "parse_recipe",
]  # fmt: skip

#: The parser in C, where there is one, is ten times as fast: a study has hundreds of files.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)

DataConfig = Annotated[TextConfig | LabelledCorpora | ParallelCorpora, Field(discriminator="name")]
TaskConfig = Annotated[MaskedLMTask | ClassificationTask | TranslationTask, Field(discriminator="name")]

#: For each task its kind of data, in words, and one of that kind.
_DATA_OF: dict[str, tuple[type, str, str]] = {
    "mlm": (CorpusConfig, "text without labels or translations", "sotu_wiki"),
    "classification": (LabelledConfig, "labelled text", "rotten_tomatoes"),
    "translation": (ParallelConfig, "sentence pairs", "debian_en_it"),
}


@config_dataclass
class Config:
    """Everything about one run. ``study`` names the directory under ``paths.runs``.

    ``branch_from`` is ``RUN_DIRECTORY@PROGRESS``: start from that milestone of a ``wsd`` run, clock included.
    ``init_from`` is a run's directory or ``RUN_DIRECTORY@PROGRESS``: finetune (``task=classification``) or compress
    (otherwise) the weights that stand there; model and pretraining are read from it. Without it, ``pretrain`` says how
    the model to finetune is made.
    ``distill`` names a run whose dense model teaches this run's while it is trained or finetuned (not in ``pretrain``).
    """

    study: str = "scratch"
    seed: int = Field(0, ge=0, lt=2**31)
    task: TaskConfig = Field(default_factory=MaskedLMTask)
    data: DataConfig = Field(default_factory=SotuWiki)
    model: ModelConfig = Field(default_factory=RobertaConfig)
    budget: BudgetConfig = Field(default_factory=BudgetConfig)
    optimizer: OptimizerConfig = Field(default_factory=OptimizerConfig)
    evaluation: EvaluationConfig = Field(default_factory=EvaluationConfig)
    checkpoint: CheckpointConfig = Field(default_factory=CheckpointConfig)
    runtime: RuntimeConfig = Field(default_factory=RuntimeConfig)
    tracker: TrackerConfig = Field(default_factory=TrackerConfig)
    paths: PathsConfig = Field(default_factory=PathsConfig)
    recipes: list[str] = Field(default_factory=lambda: ["none"])
    steps: dict[str, Any] = Field(default_factory=dict)
    branch_from: str | None = None
    init_from: str | None = None
    pretrain: Pretraining | None = None
    distill: DistillConfig | None = None

    @classmethod
    def build(cls, values: dict[str, Any]) -> Config:
        """A validated config from plain dictionaries; raises `ConfigError` naming every wrong key."""
        try:
            return TypeAdapter(cls).validate_python(values)
        except ValidationError as error:
            raise explain(error) from None

    @classmethod
    def load(cls, path: Path) -> Config:
        """The config written beside a run; raises `ConfigError` where it is damaged."""
        try:
            values = yaml.load(path.read_text(), _LOADER)
        except (yaml.YAMLError, UnicodeDecodeError):
            values = None
        if not isinstance(values, dict):
            raise ConfigError(f"{path} is damaged: it is not the YAML of a run; delete {path.parent} to do it anew")
        return cls.build(values)

    def parsed_recipes(self) -> dict[str, list[Step]]:
        """Each recipe's steps, in the order given, each recipe once."""
        return {recipe: parse_recipe(recipe, self.steps, self.model, self.task.name) for recipe in self.recipes}

    def changed(self, **changes: Any) -> Config:
        """A validated copy with other values; raises `ConfigError`."""
        try:
            return dataclasses.replace(self, **changes)
        except ValidationError as error:
            raise explain(error) from None

    @property
    def vocab_size(self) -> int:
        """Token ids asked for: of the text, or of the text that the model to finetune was pretrained on."""
        if isinstance(self.data, LabelledConfig):
            return self.pretrain.data.vocab_size if self.pretrain is not None else 0
        return self.data.vocab_size

    @property
    def longest(self) -> int | None:
        """Tokens of the longest sequence that the model takes; None for an encoder whose positions are not learned."""
        if isinstance(self.model, TransformerConfig):
            return self.model.length
        if self.model.positions != "learned":
            return None
        data = (self.pretrain or self).data
        assert not isinstance(data, ParallelConfig)
        return data.sequence_length

    def pretraining(self) -> Config | None:
        """The config of the run that makes the model to finetune, or None where there is no such run to make."""
        if self.pretrain is None or self.init_from is not None:
            return None
        made = {name: getattr(self.pretrain, name) for name in ("seed", "task", "data", "budget", "optimizer")}
        return self.changed(**made, pretrain=None, distill=None, recipes=["none"])

    @model_validator(mode="after")
    def _parts_fit_together(self) -> Config:
        if not self.study or not all(c.isalnum() or c in "._-" for c in self.study) or self.study.startswith("."):
            raise reject("study", repr(self.study), "letters, digits, '.', '_' and '-' only, not starting with '.'")
        self._task_data_and_model_fit()
        if self.task.name != "translation":
            self._batch_divides()
        if self.budget.kind == "steps" and self.optimizer.warmup * self.budget.value > self.budget.value - 1:
            raise reject("budget.value", self.budget.value,
                         f"too small for optimizer.warmup={self.optimizer.warmup}: "
                         "no step would be left after it")  # fmt: skip
        if self.model.impl == "fairseq":
            self._fairseq_can()
        if self.branch_from is not None:
            self._branch_is_possible(self.branch_from)
        self._origin_is_possible()
        for method in self.steps:
            if method not in STEPS:
                raise reject(f"steps.{method}", "..", f"no such method; known are {', '.join(sorted(STEPS))}")
        if not self.recipes:
            raise reject("recipes", "[]", "at least one recipe; 'none' is the dense model")
        self.parsed_recipes()
        return self

    def _batch_divides(self) -> None:
        share, rest = divmod(self.optimizer.batch_size, self.runtime.processes)
        if rest:
            raise reject("optimizer.batch_size", self.optimizer.batch_size,
                         f"must be a multiple of runtime.processes={self.runtime.processes}")  # fmt: skip
        if self.runtime.micro_batch and share % self.runtime.micro_batch:
            raise reject("runtime.micro_batch", self.runtime.micro_batch,
                         f"must divide the {share} sequences of one process")  # fmt: skip

    def _task_data_and_model_fit(self) -> None:
        task = self.task.name
        kind, _, example = _DATA_OF[task]
        if not isinstance(self.data, kind):
            words, its_task = next((words, name) for name, (kind, words, _) in _DATA_OF.items()
                                   if isinstance(self.data, kind))  # fmt: skip
            raise reject("data", self.data.name, f"{words}; it needs task={its_task}, and task={task} other data, "
                         f"e.g. data={example}")  # fmt: skip
        needed = "transformer" if task == "translation" else "roberta"
        if self.model.name != needed:
            raise reject("model.name", self.model.name, f"task={task} needs model={needed}")

    def _origin_is_possible(self) -> None:
        if self.task.name != "classification":
            if self.budget.kind == "epochs":
                raise reject("budget.kind", "epochs", "only task=classification counts epochs")
            if self.pretrain is not None:
                raise reject("pretrain", "..", "only task=classification finetunes a pretrained model")
            if self.distill is not None and self.init_from is not None:
                raise reject("distill.teacher", self.distill.teacher,
                             "nothing is trained here: what init_from names is compressed as it stands")  # fmt: skip
            return
        if self.branch_from is not None:
            raise reject("branch_from", self.branch_from, "a finetuning cannot branch")
        if self.init_from is None and self.pretrain is None:
            raise reject("init_from", None, "task=classification needs the directory of a pretraining run, or "
                         "pretrain=mlm and its settings to make one")  # fmt: skip
        self.pretraining()

    def _fairseq_can(self) -> None:
        if self.model.positions == "rotary":
            raise reject("model.impl", "fairseq", "fairseq has no rotary positions; model.positions=learned or "
                         "sinusoidal")  # fmt: skip
        if self.runtime.compile:
            raise reject("runtime.compile", True, "model.impl=fairseq is not compiled")
        if self.distill is not None:
            self.distill.check_impl("distill", self.model)

    def _branch_is_possible(self, branch: str) -> None:
        parse_milestone("branch_from", branch)
        if self.optimizer.schedule != "wsd":
            raise reject(
                "branch_from",
                branch,
                "only optimizer.schedule=wsd can branch (its rate is constant before the cooldown)",
            )


def _divide(numerator: float, denominator: float) -> float:
    """A setting that follows another: ``optimizer.lr: ${divide:0.32,${model.width}}``; validation refuses infinity."""
    return numerator / denominator if denominator else math.inf


OmegaConf.register_new_resolver("divide", _divide, replace=True)


def conf_directory() -> Path:
    """Where the YAML files are: inside an installed wheel, or beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "conf"
    return inside if inside.is_dir() else package.parent / "conf"


def corpus_files() -> list[Path]:
    """The files of ``conf/data``, one for each corpus that ``data=NAME`` takes, by name."""
    return sorted(conf_directory().glob("data/*.yaml"))
