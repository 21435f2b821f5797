"""``conf/task``, ``conf/budget``, ``conf/optimizer``, ``conf/evaluation`` and ``conf/checkpoint``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from train_then_compress.config.base import config_dataclass, reject


@config_dataclass
class MaskedLMTask:
    """Masked language modelling (RoBERTa): ``mask_rate`` in training, always 15 % in evaluation."""

    name: Literal["mlm"] = "mlm"
    mask_rate: float = Field(0.15, ge=0.15, le=0.9)


@config_dataclass
class ClassificationTask:
    """Finetuning on labelled text with RoBERTa's head; ``dropout`` holds while it is finetuned, trunk and head."""

    name: Literal["classification"] = "classification"
    dropout: float = Field(0.1, ge=0, lt=1)


@config_dataclass
class TranslationTask:
    """Translation of sentences (Vaswani et al. 2017).

    ``label_smoothing`` is the probability that the training loss takes from the right token and spreads over all others
    (fairseq's ``label_smoothed_cross_entropy``).
    """

    name: Literal["translation"] = "translation"
    label_smoothing: float = Field(0.1, ge=0, le=0.5)


@config_dataclass
class BudgetConfig:
    """What training may spend. ``seconds`` are training-step time only; ``epochs`` of labels."""

    kind: Literal["seconds", "flops", "tokens", "steps", "epochs"] = "seconds"
    value: float = Field(600, gt=0)

    @model_validator(mode="after")
    def _steps_are_whole(self) -> BudgetConfig:
        if self.kind == "steps" and self.value != int(self.value):
            raise reject("budget.value", self.value, "a budget in steps must be a whole number")
        return self


@config_dataclass
class OptimizerConfig:
    """AdamW and the learning-rate schedule, a function of progress = spent / budget.

    ``linear`` rises over ``warmup`` and falls to zero at progress 1; ``wsd`` rises, stays, and falls to zero over
    the last ``cooldown`` (Hägele et al. 2405.18392); ``inverse_sqrt``, for comparison with fairseq, never reaches zero.
    ``batch_size`` counts sequences per optimizer step, whatever the number of processes and of micro-batches;
    ``batch_tokens``, in its place for translation, source and target positions at most, padding included.
    """

    name: Literal["adamw"] = "adamw"
    lr: float = Field(1e-3, gt=0, le=1)
    beta1: float = Field(0.9, ge=0, lt=1)
    beta2: float = Field(0.98, ge=0, lt=1)
    eps: float = Field(1e-6, gt=0)
    weight_decay: float = Field(0.01, ge=0)
    clip: float = Field(1.0, gt=0)
    batch_size: int = Field(16, ge=1)
    batch_tokens: int = Field(4096, ge=32)
    schedule: Literal["linear", "wsd", "inverse_sqrt"] = "linear"
    warmup: float = Field(0.06, ge=0, lt=1)
    cooldown: float = Field(0.2, gt=0, le=1)

    @model_validator(mode="after")
    def _phases_fit(self) -> OptimizerConfig:
        if self.schedule == "wsd" and self.warmup + self.cooldown > 1:
            raise reject("optimizer.warmup", self.warmup, f"with optimizer.cooldown={self.cooldown} at most 1 together")
        if self.schedule == "inverse_sqrt" and not self.warmup:
            raise reject("optimizer.warmup", self.warmup, "optimizer.schedule=inverse_sqrt falls from its end on; "
                         "it must be above 0")  # fmt: skip
        return self


@config_dataclass
class EvaluationConfig:
    """Validation at ``points`` values of progress, evenly spaced in its logarithm from ``first`` to 1.

    ``validation_sequences`` and ``test_sequences`` cap the sequences scored (0: all of the split).

    For translation: test BLEU with ``beam`` hypotheses, ``length_penalty`` and at most ``max_ratio`` x source tokens +
    ``max_extra``; validation BLEU with ``validation_beam`` (1: greedy), on the first ``bleu_sentences`` of those that
    ``validation_sequences`` leaves (0: all).
    """

    points: int = Field(12, ge=1, le=1000)
    first: float = Field(0.02, gt=0, le=1)
    batch_size: int = Field(64, ge=1)
    validation_sequences: int = Field(0, ge=0)
    test_sequences: int = Field(0, ge=0)
    beam: int = Field(5, ge=1, le=16)
    validation_beam: int = Field(1, ge=1, le=16)
    bleu_sentences: int = Field(500, ge=0)
    length_penalty: float = Field(1.0, ge=0, le=5)
    max_ratio: float = Field(1.5, ge=0, le=10)
    max_extra: int = Field(10, ge=1, le=1000)


@config_dataclass
class CheckpointConfig:
    """A checkpoint every so many seconds of wall clock, and milestones at the given values of progress.

    ``keep_at_perplexity``: at the first evaluation whose validation perplexity is at most this.
    """

    every_seconds: float = Field(60.0, ge=0)
    keep_at: list[float] = Field(default_factory=list)
    keep_at_perplexity: list[float] = Field(default_factory=list)

    @model_validator(mode="after")
    def _milestones_lie_inside(self) -> CheckpointConfig:
        for progress in self.keep_at:
            if not 0 < progress < 1:
                raise reject("checkpoint.keep_at", progress, "each progress must lie between 0 and 1")
        for perplexity in self.keep_at_perplexity:
            if not perplexity > 1:
                raise reject("checkpoint.keep_at_perplexity", perplexity, "a perplexity is greater than 1")
        return self
