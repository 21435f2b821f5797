"""Draws against the distribution they are from, fairseq's cut of it, and greedy decoding."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from train_then_compress.data.prepare import EOS, PAD
from train_then_compress.evaluation.decoding import Decoding, Hypothesis, beam_search
from train_then_compress.evaluation.sampling import Sampling, sample
from train_then_compress.models.transformer import Translator

Make = Callable[..., Any]
TEN = Decoding(beam=10, length_penalty=0.5, max_ratio=1.0, max_extra=4)


def drawn(model: Translator, source: torch.Tensor, sampling: Sampling, seed: int = 0) -> list[list[Hypothesis]]:
    return sample(model, source, TEN, sampling, torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("sampling", [Sampling(temperature=1e-3), Sampling(top_k=1), Sampling(top_p=0.0)])
def test_without_a_choice_it_is_greedy(sampling: Sampling, translator: Make, sources: Make) -> None:
    model, source = translator(), sources([3, 9, 14, 6])
    greedy = beam_search(model, source, Decoding(beam=1, length_penalty=0.5, max_ratio=1.0, max_extra=4))
    for (best,), found in zip(greedy, drawn(model, source, sampling), strict=True):
        assert [hypothesis.tokens for hypothesis in found] == [best.tokens] * 10
        if sampling.temperature == 1:
            assert found[0].score == pytest.approx(best.score, abs=1e-5)


@given(st.integers(0, 12), st.floats(0.01, 1.0), st.integers(0, 999))
def test_what_is_cut_off_is_what_fairseq_cuts_off(top_k: int, top_p: float, seed: int) -> None:
    pytest.importorskip("fairseq")
    from fairseq.data import Dictionary
    from fairseq.search import Sampling as Reference

    generator = torch.Generator().manual_seed(seed)
    probabilities = (3 * torch.randn(4, 30, generator=generator)).softmax(dim=1)
    kept, words = Sampling(top_k=top_k, top_p=1.0 if top_k else top_p).candidates(probabilities)
    if top_k:
        expected, places = probabilities.topk(top_k)
    else:
        expected, places = Reference(Dictionary(), sampling_topp=top_p)._sample_topp(probabilities.log()[None])
        expected, places = expected[0], places[0]
    for ours, their, word, place in zip(kept, expected, words, places, strict=True):
        assert word[ours > 0].tolist() == place[their > 0].tolist()
        assert torch.allclose(ours[ours > 0], their[their > 0], atol=1e-6)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_first_tokens_are_as_frequent_as_they_are_likely(temperature: float, translator: Make, sources: Make) -> None:
    model, source, draws = translator(), sources([6]), 20_000
    generator = torch.Generator().manual_seed(1)
    decoding = Decoding(beam=draws, max_ratio=0, max_extra=1)
    (found,) = sample(model, source, decoding, Sampling(temperature), generator)
    frequency = torch.bincount(torch.tensor([hypothesis.tokens[0] for hypothesis in found]), minlength=40) / draws
    with torch.inference_mode():
        logits = model(source, torch.tensor([[EOS]]), torch.tensor([0]))[0] / temperature
        logits[[0, PAD, EOS]] = -torch.inf
    likely = logits.softmax(dim=0)
    assert likely.max() < 0.9
    # Five standard deviations of the share of draws.
    assert ((frequency - likely).abs() <= 5 * (likely * (1 - likely) / draws).sqrt() + 1e-9).all()


def test_scores_are_those_of_the_model_and_sorted(translator: Make, sources: Make) -> None:
    model, source = translator(), sources([3, 9])
    for row, found in zip(source, drawn(model, source, Sampling(temperature=0.8, top_k=5)), strict=True):
        row = row[row != PAD][None]
        assert [h.score for h in found] == sorted((h.score for h in found), reverse=True)
        assert len({tuple(h.tokens) for h in found}) > 1
        for hypothesis in found:
            said = torch.tensor([[*hypothesis.tokens, EOS]])
            with torch.inference_mode():
                logits = model(row, said.roll(1, dims=1), torch.arange(said.shape[1])) / 0.8
            total = logits.log_softmax(dim=1).gather(1, said.T).sum()
            assert hypothesis.score == pytest.approx(float(total) / said.shape[1] ** 0.5, abs=1e-4)
            assert 1 <= len(hypothesis.tokens) <= row.shape[1] + 4


def test_a_seed_gives_the_same_draws_again(translator: Make, sources: Make) -> None:
    model, source = translator(), sources([3, 9, 14, 6])
    first, again, other = (drawn(model, source, Sampling(), seed) for seed in (1, 1, 2))
    assert first == again and first != other
