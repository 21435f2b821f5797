"""Every method on a translator: what it does to the decoder and to attention to the source, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from train_then_compress.compression.compressed import matrices
from train_then_compress.config import Config, ConfigError
from train_then_compress.config.steps import STEPS
from train_then_compress.point import costs

SHORT = {"recovery": {"max_steps": 2}}
STEPS_OF: dict[str, dict[str, Any]] = {
    "lsq": {"max_steps": 3}, "prune": SHORT, "oneshot": SHORT, "gradual": {"training": {"steps": 10, "every": 1}},
    "wanda": SHORT, "semi": SHORT, "structured": SHORT | {"increment": 30}, "svd": SHORT | {"embeddings": True},
    "distill": {"steps": 3, "hints": "relations"}, "seqdistill": {"steps": 3, "sentences": 6},
}  # fmt: skip
QUANTIZED = ["quant4", "kmeans3", "gptq3", "smooth8", "lsq4"]
PRUNED = ["prune30", "oneshot40", "gradual40", "wanda40", "semi50"]
OTHERS = ["structured50", "svd50", "distill", "seqdistill"]
CHAINS = ["structured50+svd60+seqdistill+prune30+gptq4", "svd70+wanda40+distill+kmeans4"]


def compressed_by(stand: Callable[..., Any], recipe: str) -> tuple[Any, Any]:
    place = stand(recipe, "translation", **STEPS_OF)
    return place, place.compress()


def test_no_method_is_forgotten() -> None:
    tried = {recipe.rstrip("0123456789") for recipe in QUANTIZED + PRUNED + OTHERS}
    assert tried == {name for name, kind in STEPS.items() if "translation" in kind.tasks}
    assert set(STEPS) - tried == {"movement", "exit"}


@pytest.mark.parametrize("recipe", QUANTIZED + PRUNED + OTHERS + CHAINS)
def test_what_is_stored_gives_the_same_translator(stand: Callable[..., Any], tmp_path: Path, recipe: str) -> None:
    place, compressed = compressed_by(stand, recipe)
    place.assert_comes_back(compressed, tmp_path)
    dense = dict(place.model.named_parameters())
    after = dict(compressed.model.named_parameters())
    names = set(matrices(place.model, True))
    assert sum(name.startswith("decoder.layers.0.cross_attention.") for name in names) == 3 and len(names) == 12
    if recipe in QUANTIZED:
        assert set(compressed.codes) == names
    elif recipe in PRUNED:
        assert set(compressed.masks) == names - ({"embedding.weight"} if recipe == "semi50" else set())
        for name, mask in compressed.masks.items():
            assert not after[name][~mask].any() and 0.25 < 1 - float(mask.float().mean()) < 0.55
    elif recipe == "svd50":
        assert set(after) >= {name.replace(".weight", ".first.weight") for name in names} and not set(after) & names
    elif recipe == "structured50":
        smaller = {name for name in names if after[name].numel() == dense[name].numel() // 2}
        assert smaller == names - {"embedding.weight"}
    if recipe not in ("quant4", "kmeans3", "gptq3", "svd50", "structured50") and "+" not in recipe:
        same = {name for name in dense if name in after and torch.equal(dense[name], after[name])}
        assert not same & (names - {"embedding.weight"})


@pytest.mark.parametrize("recipe", ["structured50", "svd50", "oneshot40", "quant4", "smooth8"])
def test_its_costs_are_counted_and_it_translates(
    stand: Callable[..., Any], tmp_path: Path, untimed: None, recipe: str
) -> None:
    place, compressed = compressed_by(stand, recipe)
    for name in ("model.safetensors", "packed.safetensors"):
        (tmp_path / name).write_bytes(b"12345")
    row = costs(place.model, compressed.model, place.task, tmp_path / "packed.safetensors", tmp_path)
    dense = place.task.flops_per_token(place.model)
    assert (row["flops_per_token"] < 0.8 * dense) == (recipe in ("structured50", "svd50"))
    assert (row["flops_per_token_nonzero"] < 0.8 * row["flops_per_token"]) == (recipe == "oneshot40")
    assert 0 < row["parameters_without_embeddings"] < row["parameters"]
    assert 0 <= place.task.evaluate(compressed.model, "test").facts["bleu"] <= 100


@pytest.mark.parametrize(
    "recipe, steps, words",
    [
        ("exit90", {}, "'exit90': exit works for task=classification only"),
        ("movement60", {}, "'movement60': movement works for task=classification only"),
        ("semi50", {"semi": {"criterion": "movement"}},
         "steps.semi.criterion=movement: works for task=classification only"),
    ],
)  # fmt: skip
def test_what_makes_no_sense_for_sequences_is_refused(recipe: str, steps: dict[str, Any], words: str) -> None:
    values = {"task": {"name": "translation"}, "data": {"name": "debian_pairs"}, "model": {"name": "transformer"}}
    with pytest.raises(ConfigError) as error:
        Config.build(values | {"recipes": [recipe], "steps": steps})
    assert words in str(error.value)
