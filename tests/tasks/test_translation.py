"""Translation: loss against fairseq's criterion, BLEU against translations by hand, costs against torch's counter."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import sacrebleu
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train_then_compress.config import ConfigError
from train_then_compress.data.prepare import BOS, EOS, MASK, PAD
from train_then_compress.models.transformer import Translator
from train_then_compress.tasks import TranslationTask

BuildTask = Callable[..., Any]


@pytest.fixture
def task(build_task: BuildTask) -> TranslationTask:
    made: TranslationTask = build_task("translation")
    return made


def single_pairs(task: TranslationTask, split: str) -> list[tuple[Tensor, Tensor]]:
    """Source and target of each pair, int64 [1, length], ``</s>`` last."""
    pairs = task.pairs.split(split)
    sides = [pairs.sides(number) for number in range(len(pairs))]
    return [tuple(torch.tensor([[*side.tolist(), EOS]]) for side in both) for both in sides]  # type: ignore[misc]


def decoder_input(target: Tensor) -> Tensor:
    return torch.cat([torch.full((len(target), 1), EOS), target[:, :-1]], dim=1)


@pytest.mark.parametrize("smoothing", [0.0, 0.1, 0.3])
def test_the_loss_is_fairseqs_label_smoothed_cross_entropy(build_task: BuildTask, smoothing: float) -> None:
    pytest.importorskip("fairseq")
    from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

    task = build_task("translation", task={"label_smoothing": smoothing})
    model = task.new_model().eval()
    batch = next(batch for batch in map(task.batch, range(50)) if (batch.labels == PAD).any())
    (part,) = task.parts(batch, 0, 1, 0)
    with torch.no_grad():
        loss, terms = task.loss(model, part)
        logits = model(part.source, part.target, torch.arange(batch.target.size))
    labels = torch.from_numpy(batch.labels).flatten()[:, None]
    theirs, _ = label_smoothed_nll_loss(logits.log_softmax(1), labels, smoothing, ignore_index=PAD)
    assert float(loss) == pytest.approx(float(theirs), rel=1e-5)
    assert terms == int((batch.labels != PAD).sum()) == int(part.terms_each.sum()) < batch.labels.size


def test_pieces_add_up_to_the_batch(task: TranslationTask) -> None:
    """Ranks of unequal shares, micro-batches, and more ranks than pairs."""
    model = task.new_model().eval()
    batch = task.batch(0)
    ((loss, terms),) = (task.loss(model, part) for part in task.parts(batch, 0, 1, 0))
    for ranks, micro_batch in ((2, 0), (3, 4), (len(batch.source) + 2, 0)):
        parts = [part for rank in range(ranks) for part in task.parts(batch, rank, ranks, micro_batch)]
        pieces = [task.loss(model, part) for part in parts]
        assert sum(len(part.tokens) for part in parts) == len(batch.source)
        assert sum(count for _, count in pieces) == terms
        assert float(sum(value for value, _ in pieces)) == pytest.approx(float(loss), rel=1e-5)


def test_counts_are_tokens_of_both_sides_without_padding_and_flops_with_it(task: TranslationTask) -> None:
    """FLOPs: torch's own counter over one forward pass in which nothing fills up, three times."""
    model = task.new_model().eval()
    batch = task.batch(0)
    counts = task.counts(batch)
    assert counts.tokens == int((batch.source != PAD).sum() + (batch.labels != PAD).sum())
    (part,) = task.parts(batch, 0, 1, 0)
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(part.source, part.target, part.where[: part.terms])
    assert counts.flops == 3 * counter.get_total_flops()


def test_loss_and_perplexity_are_those_of_single_pairs(task: TranslationTask) -> None:
    """Padding, batches and their order do not matter; the loss is not smoothed."""
    model = task.new_model().eval()
    total, count = 0.0, 0
    with torch.inference_mode():
        for source, target in single_pairs(task, "test")[:20]:
            logits = model(source, decoder_input(target), torch.arange(target.numel()))
            total += float(F.cross_entropy(logits, target[0], reduction="sum"))
            count += target.numel()
    quality = task.evaluate(model, "test")
    assert quality.facts["loss"] == pytest.approx(total / count, rel=1e-5)
    assert quality.facts["perplexity"] == pytest.approx(float(torch.tensor(total / count).exp()), rel=1e-5)


def greedy(model: Translator, source: Tensor, limit: int) -> list[int]:
    """The likeliest next token, one after the other, each from a pass over everything."""
    tokens: list[int] = []
    while len(tokens) < limit:
        logits = model(source, torch.tensor([[EOS, *tokens]]), torch.tensor([len(tokens)]))[0]
        logits[[BOS, PAD, MASK] + [EOS] * (not tokens)] = -torch.inf
        if int(logits.argmax()) == EOS:
            break
        tokens.append(int(logits.argmax()))
    return tokens


def test_validation_bleu_is_sacrebleus_of_greedy_translations(task: TranslationTask, trained: Translator) -> None:
    quality = task.evaluate(trained, "valid")
    tokenizer = Tokenizer.from_file(str(task.pairs.tokenizer))
    trained.eval()
    with torch.inference_mode():
        sources = [source for source, _ in single_pairs(task, "valid")[:10]]
        found = [greedy(trained, source, int(1.5 * source.numel() + 10)) for source in sources]
    texts, references = [tokenizer.decode(tokens).strip() for tokens in found], task.pairs.texts("valid")[1][:10]
    assert quality.name == task.measure == "bleu" and quality.higher_is_better and quality.facts["bleu_sentences"] == 10
    assert quality.value == quality.facts["bleu"] == sacrebleu.corpus_bleu(texts, [references]).score > 1
    assert quality.facts["chrf"] == sacrebleu.corpus_chrf(texts, [references]).score
    assert "nrefs:1" in quality.signatures["bleu_signature"]


def test_test_bleu_is_of_beam_search_with_its_interval(task: TranslationTask, trained: Translator) -> None:
    quality = task.evaluate(trained, "test")
    assert quality.facts["bleu_sentences"] == 20
    assert quality.facts["bleu_low"] <= quality.facts["bleu"] <= quality.facts["bleu_high"]
    assert "nc:6" in quality.signatures["chrf_signature"]


def test_copying_is_scored_on_the_same_sentences(task: TranslationTask) -> None:
    for split, count in (("valid", 10), ("test", 20)):
        sources, references = (side[:count] for side in task.pairs.texts(split))
        assert task.copied()["copy_bleu"][split] == sacrebleu.corpus_bleu(sources, [references]).score
        assert task.copied()["copy_chrf"][split] == sacrebleu.corpus_chrf(sources, [references]).score


def test_flops_per_token_are_a_mean_test_pairs(task: TranslationTask) -> None:
    model = task.new_model().eval()
    source, target = (round(float(mean)) for mean in task.pairs.split("test").lengths.mean(axis=0))
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.full((1, source), 7), torch.full((1, target), 7), torch.arange(target))
    assert task.flops_per_token(model) == counter.get_total_flops() / target


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"model": {"length": 16}}, "model.length=16: a sentence of the train split has"),
        ({"optimizer": {"batch_tokens": 32}}, "optimizer.batch_tokens=32: the longest pair alone has"),
    ],
)
def test_what_is_too_short_for_the_sentences_is_refused(
    build_task: BuildTask, settings: dict[str, Any], words: str
) -> None:
    with pytest.raises(ConfigError) as error:
        build_task("translation", **settings)
    assert words in str(error.value)


@pytest.fixture(scope="module")
def trained(translator_run: Any) -> Translator:
    """A translator that has learned a little."""
    from train_then_compress.cell import locate
    from train_then_compress.config import Config
    from train_then_compress.tasks import task_of
    from train_then_compress.training.checkpoint import read_weights

    config = Config.load(translator_run / "config.yaml")
    model = task_of(config, locate(config).data).new_model()
    model.load_state_dict(read_weights(next(translator_run.glob("stages/pretrain-*/model.safetensors"))))
    assert isinstance(model, Translator)
    return model
