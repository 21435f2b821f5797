"""RoBERTa in the form that fairseq publishes: ``model.pt``, ``dict.txt`` and the files of a byte-level BPE."""

from __future__ import annotations

import argparse
import json
import pickle
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from torch.serialization import safe_globals

from train_then_compress.config import RobertaConfig
from train_then_compress.config.parts import in_embedding
from train_then_compress.data.fairseq_files import read_dictionary
from train_then_compress.data.prepare import MASK, SPECIAL_TOKENS, UNK
from train_then_compress.models.fairseq.weights import ROBERTA, Incompatible, from_fairseq
from train_then_compress.models.positions import FIRST_POSITION
from train_then_compress.models.roberta import MaskedLM

#: Tokens and merges of a byte-level BPE: GPT-2's names (fairseq: ``--bpe gpt2``), and those of ``--bpe hf_byte_bpe``.
_BPE_FILES = (("encoder.json", "vocab.bpe"), ("vocab.json", "merges.txt"))
_GPT2 = "https://dl.fbaipublicfiles.com/fairseq/gpt2_bpe/"
_EMBEDDINGS = "encoder.sentence_encoder"


@dataclass(frozen=True)
class Published:
    """``model`` and ``tokenizer`` have our numbers, special tokens first; ``updates``: optimizer steps of training."""

    model: MaskedLM
    tokenizer: Tokenizer
    updates: int


def read_roberta(directory: Path) -> Published:
    """The model in a directory, nothing of it executed; raises `Incompatible` for what is missing or has no counterpart
    here, and `ConfigError` for an impossible shape."""
    if not directory.is_dir():
        raise Incompatible(f"{directory}: no such directory")
    bpe = _bpe_files(directory)
    symbols = _symbols(directory / "dict.txt")
    state = _load(directory / "model.pt")
    ours = [*SPECIAL_TOKENS, *(symbol for symbol in symbols if symbol not in SPECIAL_TOKENS)]
    place = {symbol: number for number, symbol in enumerate(symbols)}
    try:
        model = _model(state, [place[token] for token in ours])
    except Incompatible as error:
        raise Incompatible(f"{directory / 'model.pt'}: {error}") from None
    history = state.get("optimizer_history") or [{}]
    return Published(model, _tokenizer(*bpe, ours, _has_prefix_space(state)), int(history[-1].get("num_updates", 0)))


def _load(path: Path) -> dict[str, Any]:
    """A checkpoint: tensors, plain values and ``argparse.Namespace``, and nothing else."""
    if not path.is_file():
        raise Incompatible(f"{path}: no such file")
    try:
        with safe_globals([argparse.Namespace]):
            state: dict[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        # The rest of what torch says is how to load it all the same.
        found = re.search(r"Unsupported global: GLOBAL \S+", str(error))
        raise Incompatible(f"{path} is damaged, or holds more than tensors, plain values and argparse.Namespace: it is "
                           f"not loaded{f' ({found[0]})' if found else ''}") from None  # fmt: skip
    if not isinstance(state, dict) or "model" not in state:
        raise Incompatible(f"{path} is no checkpoint of fairseq's")
    return state


def _model(state: dict[str, Any], order: list[int]) -> MaskedLM:
    """The model; its token ``i`` is fairseq's ``order[i]``."""
    settings, theirs = _settings(state), _renamed(state["model"])
    rows = len(theirs[f"{_EMBEDDINGS}.embed_tokens.weight"])
    if rows != len(order):
        raise Incompatible(f"dict.txt has {len(order)} tokens, special ones included, and the embedding {rows}")
    positions = theirs.get(f"{_EMBEDDINGS}.embed_positions.weight")
    length = settings.get("max_positions", 512) if positions is None else len(positions) - FIRST_POSITION
    model = MaskedLM(_config(settings), rows, length)
    weights = from_fairseq(theirs, ROBERTA, model.state_dict())
    for name in weights:
        if name == "bias" or in_embedding(name):
            weights[name] = weights[name][order]
    model.load_state_dict(weights)
    return model.eval()


def _settings(state: dict[str, Any]) -> dict[str, Any]:
    """The model's arguments, from either place where releases of fairseq keep them."""
    arguments = state.get("args") or (state.get("cfg") or {}).get("model")
    if arguments is None:
        raise Incompatible("it says nothing of the model's shape (neither args nor cfg)")
    return vars(arguments) if isinstance(arguments, argparse.Namespace) else arguments


def _has_prefix_space(state: dict[str, Any]) -> bool:
    """Whether text was given a space in front before it became tokens, from the same two places."""
    said = state.get("args"), (state.get("cfg") or {}).get("bpe")
    settings = [vars(one) if isinstance(one, argparse.Namespace) else one for one in said if one]
    return any(one.get("bpe_add_prefix_space", False) for one in settings)


def _config(settings: dict[str, Any]) -> RobertaConfig:
    """The shape; where nothing is said, what fairseq's ``roberta`` assumes."""
    width, heads = settings.get("encoder_embed_dim", 768), settings.get("encoder_attention_heads", 12)
    always = {"activation_fn": "gelu", "layernorm_embedding": True, "encoder_ffn_embed_dim": 4 * width}
    for key, value in always.items():
        if settings.get(key, value) != value:
            raise Incompatible(f"its {key} is {settings[key]}; here it is always {value}")
    return RobertaConfig(
        depth=settings.get("encoder_layers", 12), width=width, head_size=width // heads,
        norm="pre" if settings.get("encoder_normalize_before") else "post",
        positions="learned" if settings.get("encoder_learned_pos", True) else "sinusoidal",
        dropout=settings.get("dropout", 0.1), tied=not settings.get("untie_weights_roberta", False),
    )  # fmt: skip


def _renamed(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    """Today's names for those of earlier releases; heads of classifiers are left out."""
    weights: dict[str, Tensor] = {}
    for name, value in theirs.items():
        if name.startswith("classification_heads."):
            continue
        name = name.replace("decoder.", "encoder.", 1).replace(".emb_layer_norm.", ".layernorm_embedding.")
        module, fused, kind = name.partition("in_proj_")
        pieces = zip("qkv", value.float().chunk(3), strict=True) if fused else ()
        weights |= {f"{module}{which}_proj.{kind}": piece for which, piece in pieces} or {name: value.float()}
    return weights


def _symbols(path: Path) -> list[str]:
    """fairseq's tokens in the order of its numbers: four special ones, the file's, and <mask> if it is not there."""
    if not path.is_file():
        raise Incompatible(f"{path}: no such file")
    try:
        symbols = read_dictionary(path)
    except ValueError as error:
        raise Incompatible(f"{path.parent}: {error}") from None
    mask = SPECIAL_TOKENS[MASK]
    return symbols if mask in symbols else [*symbols, mask]


def _bpe_files(directory: Path) -> tuple[Path, Path]:
    for names in _BPE_FILES:
        paths = directory / names[0], directory / names[1]
        if all(path.is_file() for path in paths):
            return paths
    raise Incompatible(f"{directory}: the byte-level BPE is missing: encoder.json and vocab.bpe (GPT-2's, which the "
                       f"published RoBERTas use, are at {_GPT2}), or vocab.json and merges.txt")  # fmt: skip


def _tokenizer(pieces: Path, merges: Path, ours: list[str], prefix_space: bool) -> Tokenizer:
    """The BPE, whose numbers are the dictionary's words, with our numbers.

    Pieces that the dictionary lacks are not made (fairseq makes <unk> of them): their parts stand in their place.
    """
    numbers = {word: number for number, word in enumerate(ours)}
    found: dict[str, int] = json.loads(pieces.read_text())
    ids = {piece: numbers[str(number)] for piece, number in found.items() if str(number) in numbers}
    # Special tokens, and words that no text has (madeupword0000), keep their places.
    taken = set(ids.values())
    ids |= {word: number for word, number in numbers.items() if number not in taken}
    pairs = [line.split(" ") for line in merges.read_text().splitlines() if line and not line.startswith("#version")]
    kept = [(first, second) for first, second in pairs if {first, second, first + second} <= ids.keys()]
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=kept, unk_token=SPECIAL_TOKENS[UNK]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix_space)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    return tokenizer
