"""What decodes the same batches beside each other: ours, fairseq, transformers and CTranslate2, on the same weights."""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from parties.loops import transformers
from train_then_compress.config import ConfigError
from train_then_compress.cost.engines import Unavailable, load
from train_then_compress.data.prepare import BOS, EOS, PAD, SPECIAL_TOKENS
from train_then_compress.evaluation.decoding import Decoding, beam_search
from train_then_compress.export import ctranslate2
from train_then_compress.export.point import ExportError, Point
from train_then_compress.export.tokenizer import vocabulary
from train_then_compress.models.fairseq.modules import dictionary, transformer
from train_then_compress.models.fairseq.weights import TRANSFORMER, state_dict, to_fairseq
from train_then_compress.models.transformer import Translator

OURS, FAIRSEQ = "train_then_compress", "fairseq"
#: Of each source, the tokens and scores of its hypotheses (None where it does not say).
Found = list[list[tuple[list[int], float | None]]]
#: What decodes a batch of sources.
Decoder = Callable[[Tensor], Found]


def decoders(
    model: Translator, point: Point | None, decoding: Decoding, threads: int
) -> tuple[dict[str, Decoder], dict[str, str]]:
    """All that take the model, ours first, by name; and of the others why they do not."""
    made: dict[str, Callable[[], Decoder]] = {
        OURS: lambda: ours(model, decoding), FAIRSEQ: lambda: fairseq(model, point, decoding),
        "transformers": lambda: generate(model, point, decoding),
    } | {f"CTranslate2 {kind}": partial(in_ctranslate2, point, decoding, threads, kind)
         for kind in ("float32", "int8")}  # fmt: skip
    found, left_out = {}, {}
    for name, make in made.items():
        try:
            found[name] = make()
        except (ConfigError, ExportError, Unavailable) as error:
            left_out[name] = str(error)
    return found, left_out


def ours(model: Translator, decoding: Decoding) -> Decoder:
    """Our beam search."""

    def decode(source: Tensor) -> Found:
        return [[(h.tokens, h.score) for h in found] for found in beam_search(model, source, decoding)]

    return decode


def fairseq_generator(model: Translator, **settings: Any) -> Any:
    """fairseq's SequenceGenerator, for its TransformerModel with the same weights."""
    logging.getLogger("fairseq").setLevel(logging.WARNING)
    from fairseq.sequence_generator import SequenceGenerator

    vocab_size = model.embedding.weight.shape[0]
    theirs: Any = transformer(model.config, vocab_size, model.length)
    theirs.load_state_dict(state_dict(dict(model.named_parameters()), TRANSFORMER), strict=False)
    theirs.eval().make_generation_fast_()
    return SequenceGenerator([theirs], dictionary(vocab_size), tokens_to_suppress=(SPECIAL_TOKENS[BOS],), **settings)


def sample(source: Tensor) -> dict[str, dict[str, Tensor]]:
    """A batch as fairseq takes it."""
    return {"net_input": {"src_tokens": source, "src_lengths": (source != PAD).sum(dim=1)}}


def refuse_changes(point: Point | None, library: str) -> None:
    """Raise `ExportError` where compression changed more than weights."""
    if point is not None:
        point.refuse_changes(library, "a point that changes weights alone can be measured beside it")


def fairseq(model: Translator, point: Point | None, decoding: Decoding) -> Decoder:
    """fairseq's generator."""
    refuse_changes(point, "fairseq")
    generator = fairseq_generator(model, beam_size=decoding.beam, max_len_b=decoding.max_extra)

    def decode(source: Tensor) -> Found:
        with torch.inference_mode():
            found = generator.generate([], sample(source))
        return [[(h["tokens"].tolist()[:-1], float(h["score"])) for h in hypotheses] for hypotheses in found]

    return decode


def generate(model: Translator, point: Point | None, decoding: Decoding) -> Decoder:
    """transformers' ``generate``, for its M2M100 with the same weights: fairseq's Transformer with pre-norm."""
    config, length = model.config, model.length
    if config.norm != "pre" or config.positions != "sinusoidal" or not config.tied:
        raise ConfigError("its M2M100 has normalization first, sinusoidal positions and one embedding for all only")
    refuse_changes(point, "transformers' M2M100")
    library = transformers()
    sides = {f"{side}_{what}": value for side, layers in (("encoder", config.encoder_layers),
                                                          ("decoder", config.decoder_layers))
             for what, value in (("layers", layers), ("attention_heads", config.heads),
                                 ("ffn_dim", 4 * config.width), ("layerdrop", 0.0))}  # fmt: skip
    theirs = library.M2M100ForConditionalGeneration(library.M2M100Config(
        vocab_size=model.embedding.weight.shape[0], d_model=config.width, activation_function="relu",
        scale_embedding=True, max_position_embeddings=length, pad_token_id=PAD, bos_token_id=BOS, eos_token_id=EOS,
        decoder_start_token_id=EOS, **sides,
    ))  # fmt: skip
    weights = to_fairseq(dict(model.named_parameters()), TRANSFORMER)
    weights = {f"model.{name}": value for name, value in weights.items() if "output_projection" not in name}
    embedding = dict.fromkeys(("model.shared.weight", "lm_head.weight"), model.embedding.weight)
    theirs.load_state_dict(weights | embedding, strict=True)
    theirs.eval()

    def decode(source: Tensor) -> Found:
        with torch.inference_mode():
            found = theirs.generate(
                source, attention_mask=(source != PAD).long(), num_beams=decoding.beam, do_sample=False,
                early_stopping=decoding.beam > 1, length_penalty=decoding.length_penalty, suppress_tokens=[BOS, PAD],
                max_new_tokens=decoding.max_extra + 1, min_new_tokens=1, forced_eos_token_id=EOS,
            )  # fmt: skip
        return [[([token for token in row[1:] if token not in (EOS, PAD)], None)] for row in found.tolist()]

    return decode


def in_ctranslate2(point: Point | None, decoding: Decoding, threads: int, quantization: str) -> Decoder:
    """CTranslate2, on the point's export; it stops only once it has as many hypotheses as the beam is wide."""
    if point is None:
        raise ExportError("it takes trained models: --point")
    engine = load("ctranslate2")
    with tempfile.TemporaryDirectory() as directory:
        ctranslate2.write(point, Path(directory), quantization)
        translator = engine.Translator(directory, device="cpu", intra_threads=threads)
    words = vocabulary(point.tokenizer)
    numbers = {word: number for number, word in enumerate(words)}

    def decode(source: Tensor) -> Found:
        found = translator.translate_batch(
            [[words[token] for token in row if token not in (EOS, PAD)] for row in source.tolist()],
            beam_size=decoding.beam, num_hypotheses=decoding.beam, length_penalty=decoding.length_penalty,
            max_decoding_length=decoding.max_extra,
        )  # fmt: skip
        return [
            [([numbers[word] for word in hypothesis], None) for hypothesis in result.hypotheses] for result in found
        ]

    return decode
