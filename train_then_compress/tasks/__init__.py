"""Tasks: what a model is trained and judged on, in the form that the training loop asks for."""

from __future__ import annotations

from train_then_compress.config import Config
from train_then_compress.data.examples import Labelled
from train_then_compress.data.pairs import Pairs
from train_then_compress.data.prepare import Prepared
from train_then_compress.tasks.classification import ClassificationTask
from train_then_compress.tasks.masked_lm import MaskedLMTask
from train_then_compress.tasks.translation import TranslationTask

__all__ = ["ClassificationTask", "MaskedLMTask", "RunTask", "TranslationTask", "task_of"]

RunTask = MaskedLMTask | ClassificationTask | TranslationTask


def task_of(config: Config, data: Prepared | Labelled | Pairs) -> RunTask:
    """The task of a run."""
    if isinstance(data, Labelled):
        return ClassificationTask(config, data, config.seed)
    if isinstance(data, Pairs):
        return TranslationTask(config, data, config.seed)
    return MaskedLMTask(config, data, config.seed)
