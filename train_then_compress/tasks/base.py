"""What the tasks of a run have in common: a model from the config, and batches from a seed."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any, Generic, Self

import torch
from torch import Tensor, nn

from train_then_compress.config import Config
from train_then_compress.cost.flops import forward_flops
from train_then_compress.models.fairseq.modules import Model, implemented


class ConfiguredTask(ABC, Generic[Model]):
    """Models of the config's shape, on its device; altered copies of the task."""

    def __init__(self, config: Config):
        self.config, self.device = config, torch.device(config.runtime.device)

    def _start(self, seed: int) -> None:
        """What a subclass calls once it has its data."""
        self.batch = self._batches(seed)
        with torch.device("meta"):
            self._flops = forward_flops(self.model_of(self.config))

    @abstractmethod
    def _batches(self, seed: int) -> Any:
        """The training batches in the order of a seed."""

    @abstractmethod
    def model_of(self, config: Config) -> Model:
        """A model of some run's shape, for the data of this task."""

    def new_model(self) -> Model:
        """A model initialized from the config's seed."""
        torch.manual_seed(self.config.seed)
        return implemented(self.model_of(self.config), self.config.model.impl).to(self.device)

    def load_origin(self, model: nn.Module, weights: Mapping[str, Tensor]) -> None:
        """Put the weights of another run into the model: here of one of the same kind."""
        model.load_state_dict(dict(weights))

    def with_seed(self, seed: int) -> Self:
        """The same task with its training batches drawn from another seed."""
        other = copy.copy(self)
        other.batch = self._batches(seed)
        return other

    def counting(self, model: nn.Module) -> Self:
        """The same task with FLOPs counted for a model of other shape."""
        other = copy.copy(self)
        other._flops = forward_flops(model)
        return other
