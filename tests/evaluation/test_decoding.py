"""Beam search against fairseq's generator, against exhaustive search, and against greedy decoding by hand."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from train_then_compress.data.prepare import BOS, EOS, MASK, PAD, UNK
from train_then_compress.evaluation.decoding import Decoding, beam_search, largest
from train_then_compress.models.fairseq.modules import dictionary, transformer
from train_then_compress.models.fairseq.weights import TRANSFORMER, state_dict
from train_then_compress.models.transformer import CrossAttention, Translator

pytest.importorskip("fairseq")
Make = Callable[..., Any]
#: Of <s> and <mask>, which fairseq's generator would produce.
FORBIDDEN = -1e9


def as_fairseq(model: Translator) -> Any:
    """fairseq's TransformerModel with the same weights, which never produces what ours never does."""
    reference: Any = transformer(model.config, model.embedding.num_embeddings, model.length)
    reference.load_state_dict(state_dict(model.state_dict(), TRANSFORMER))
    probabilities_of = reference.get_normalized_probs

    def without_forbidden(output: Any, log_probs: bool, sample: Any = None) -> Tensor:
        probabilities: Tensor = probabilities_of(output, log_probs, sample)
        probabilities[..., [BOS]] = FORBIDDEN
        return probabilities

    reference.get_normalized_probs = without_forbidden
    return reference.eval()


def fairseq_hypotheses(model: Translator, source: Tensor, decoding: Decoding) -> list[list[tuple[list[int], float]]]:
    from fairseq.sequence_generator import SequenceGenerator

    generator = SequenceGenerator(
        [as_fairseq(model)], dictionary(model.embedding.num_embeddings), beam_size=decoding.beam, max_len_a=0,
        max_len_b=decoding.max_extra, len_penalty=decoding.length_penalty,
    )  # fmt: skip
    with torch.inference_mode():
        found = generator.generate([], {"net_input": {"src_tokens": source, "src_lengths": (source != PAD).sum(1)}})
    return [[(h["tokens"].tolist()[:-1], float(h["score"])) for h in hypotheses] for hypotheses in found]


@pytest.mark.parametrize("beam", [1, 4, 5])
@pytest.mark.parametrize("penalty", [0.6, 1.0])
@pytest.mark.parametrize("kind", ["random", "trained"])
def test_hypotheses_and_scores_are_those_of_fairseqs_generator(
    kind: str, beam: int, penalty: float, translator: Make, trained: Translator, sources: Make
) -> None:
    model, source = translator() if kind == "random" else trained, sources([3, 9, 14, 6, 11, 4, 8])
    decoding = Decoding(beam=beam, length_penalty=penalty, max_ratio=0, max_extra=20)
    expected = fairseq_hypotheses(model, source, decoding)
    found = beam_search(model, source, decoding)
    lengths = {len(hypothesis.tokens) for hypotheses in found for hypothesis in hypotheses}
    assert beam == 1 or len(lengths) > 3, "the comparison must see hypotheses of several lengths"
    for ours, theirs in zip(found, expected, strict=True):
        assert [hypothesis.tokens for hypothesis in ours] == [tokens for tokens, _ in theirs]
        assert [hypothesis.score for hypothesis in ours] == pytest.approx([score for _, score in theirs], abs=1e-4)


def test_a_sentence_does_not_depend_on_its_batch(translator: Make, sources: Make) -> None:
    model, source = translator(), sources([3, 9, 14, 6])
    decoding = Decoding(beam=4, max_ratio=1.2, max_extra=3)
    together = beam_search(model, source, decoding)
    for row, found in zip(source, together, strict=True):
        (alone,) = beam_search(model, row[row != PAD][None], decoding)
        assert [hypothesis.tokens for hypothesis in alone] == [hypothesis.tokens for hypothesis in found]
        assert max(len(hypothesis.tokens) for hypothesis in found) <= 1.2 * int((row != PAD).sum()) + 3


def test_greedy_takes_the_likeliest_token_each_time(translator: Make, sources: Make) -> None:
    model, source = translator(), sources([5])
    (found,) = beam_search(model, source, Decoding(beam=1, max_ratio=0, max_extra=12))
    tokens = [EOS]
    with torch.inference_mode():
        while len(tokens) <= 12:
            logits = model(source, torch.tensor([tokens]), torch.tensor([len(tokens) - 1]))[0]
            logits[[0, PAD] + ([EOS] if len(tokens) == 1 else [])] = -torch.inf
            tokens.append(int(logits.argmax()))
            if tokens[-1] == EOS:
                break
    assert found[0].tokens == [token for token in tokens if token != EOS]


def test_a_wide_beam_finds_the_best_of_all_translations(translator: Make, sources: Make) -> None:
    """Five words, up to three of them: a beam wider than all prefixes is exhaustive search."""
    vocabulary = MASK + 4
    model, source = translator(vocabulary=vocabulary), sources([4], vocabulary)
    words = [UNK, *range(MASK, vocabulary)]

    def score(tokens: tuple[int, ...]) -> float:
        target = torch.tensor([[EOS, *tokens]])
        with torch.inference_mode():
            logits = model(source, target, torch.arange(len(tokens) + 1)).log_softmax(dim=1)
        return float(logits.gather(1, torch.tensor([[*tokens, EOS]]).T).sum()) / (len(tokens) + 1)

    everything = [tokens for n in range(1, 4) for tokens in itertools.product(words, repeat=n)]
    best = max(everything, key=score)
    (found,) = beam_search(model, source, Decoding(beam=100, max_ratio=0, max_extra=3))
    assert tuple(found[0].tokens) == best and found[0].score == pytest.approx(score(best), abs=1e-5)


@pytest.mark.parametrize("beam", [2, 16])
def test_finished_sentences_leave_the_batch_and_sources_are_projected_once(
    beam: int, translator: Make, sources: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, source = translator(), sources([3, 9, 14, 6])
    steps: list[int] = []
    projected: list[int] = []
    step, remember = Translator.step, CrossAttention.remember

    def counted_step(self: Translator, tokens: Tensor, *state: Any) -> Tensor:
        steps.append(len(tokens))
        return step(self, tokens, *state)

    def counted_remember(self: CrossAttention, encoded: Tensor) -> tuple[Tensor, Tensor]:
        projected.append(len(encoded))
        return remember(self, encoded)

    monkeypatch.setattr(Translator, "step", counted_step)
    monkeypatch.setattr(CrossAttention, "remember", counted_remember)
    found = beam_search(model, source, Decoding(beam=beam, max_ratio=1.0, max_extra=2))
    assert projected == [4] * len(model.decoder.layers)
    assert steps == sorted(steps, reverse=True) and steps[0] == 4 and steps[-1] < 4
    assert len(steps) <= 1 + 14 + 2
    assert all(1 <= len(hypotheses) <= beam for hypotheses in found)
    for hypotheses in found:
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)
        assert len({tuple(hypothesis.tokens) for hypothesis in hypotheses}) == len(hypotheses)


def test_a_model_in_training_is_in_training_afterwards(translator: Make, sources: Make) -> None:
    model = translator().train()
    try:
        beam_search(model, sources([3]), Decoding(beam=1))
        assert model.training
    finally:
        model.eval()


@given(st.integers(1, 40), st.integers(1, 20), st.sampled_from([63, 64, 640, 64 * 30]), st.integers(0, 999))
def test_the_largest_are_those_of_topk(rows: int, count: int, size: int, seed: int) -> None:
    values = torch.randn(rows, 2, size, generator=torch.Generator().manual_seed(seed))
    values[values > 2] = -torch.inf
    found, places = largest(values, count)
    assert torch.equal(found, values.topk(count, dim=2).values)
    assert torch.equal(values.gather(2, places), found)
    assert all(len(set(row)) == count for row in places.flatten(0, 1).tolist())
