"""Speculative decoding against greedy decoding of the large model: the same, whatever the draft says."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from train_then_compress.data.prepare import PAD
from train_then_compress.evaluation.decoding import Decoding, beam_search
from train_then_compress.evaluation.speculative import Speculative
from train_then_compress.models.transformer import Translator

Make = Callable[..., Any]


@settings(max_examples=40)
@given(
    lengths=st.lists(st.integers(2, 14), min_size=1, max_size=5), draft_length=st.integers(1, 7),
    noise=st.sampled_from([0.0, 0.02, 0.05, 0.3]), extra=st.integers(1, 12), seed=st.integers(1, 20),
)  # fmt: skip
def test_translations_and_scores_are_those_of_the_large_model(
    translator: Make, sources: Make, lengths: list[int], draft_length: int, noise: float, extra: int, seed: int
) -> None:
    model, draft = translator(seed=seed).double(), translator(seed=seed, noise=noise).double()
    source, decoding = sources(lengths, seed=seed), Decoding(beam=1, max_ratio=1.0, max_extra=extra)
    speculative = Speculative(model, draft, draft_length, decoding)
    expected = beam_search(model, source, decoding)
    for (ours,), (greedy,) in zip(speculative(source), expected, strict=True):
        assert ours.tokens == greedy.tokens
        assert ours.score == pytest.approx(greedy.score, abs=1e-9)
    said = sum(len(hypothesis.tokens) + 1 for (hypothesis,) in expected)
    assert 0 <= speculative.accepted <= speculative.drafted and speculative.passes <= said
    assert speculative.passes + speculative.accepted >= said, "each pass gives what stood and at most one token more"
    if noise == 0:
        assert speculative.acceptance == 1 or speculative.drafted == 0


def test_a_small_model_drafts_for_a_trained_one(translator: Make, trained: Translator, sources: Make) -> None:
    """In float32, with another depth: as long as no two tokens are within 1e-5, the same."""
    source, decoding = sources([9, 4, 12, 7, 3, 10]), Decoding(beam=1)
    for draft in (translator(depth=1), trained):
        speculative = Speculative(trained, draft, 4, decoding)
        expected = beam_search(trained, source, decoding)
        assert [h[0].tokens for h in speculative(source)] == [h[0].tokens for h in expected]
    assert speculative.acceptance == 1
    tokens = sum(len(hypothesis.tokens) + 1 for (hypothesis,) in expected)
    assert speculative.passes < tokens / 2, "a pass checks several tokens"


def test_sentences_leave_when_they_end_and_counts_add_up(translator: Make, sources: Make) -> None:
    model, draft = translator().double(), translator(noise=0.05).double()
    source, decoding = sources([3, 9, 14, 6]), Decoding(beam=1, max_ratio=1.0, max_extra=3)
    together = Speculative(model, draft, 3, decoding)
    found = together(source)
    alone = Speculative(model, draft, 3, decoding)
    assert [alone(row[row != PAD][None])[0][0].tokens for row in source] == [h[0].tokens for h in found]
    assert alone.drafted >= together.drafted > 0


def test_a_draft_of_fewer_positions_is_refused(translator: Make, trained: Translator) -> None:
    short = translator()
    short.length = 20
    with pytest.raises(ValueError, match="the draft has 20 positions; the model's 40 are needed"):
        Speculative(trained, short, 4, Decoding())


def test_both_models_are_as_they_were(translator: Make, sources: Make) -> None:
    model, draft = translator().train(), translator()
    Speculative(model, draft, 2, Decoding())(sources([5]))
    assert model.training and not draft.training and not torch.is_inference_mode_enabled()
