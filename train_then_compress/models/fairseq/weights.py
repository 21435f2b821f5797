"""Our weights under fairseq's names, and back: tensors in dictionaries renamed, split and joined, differentiably.

fairseq has queries, keys and values apart, rows in its position tables that no position reads, and a second name for
what is shared. Its models without a counterpart here: translators that share two of their three embeddings, and biases
or normalizations left out.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from train_then_compress.models.positions import FIRST_POSITION

_IN_A_LAYER = {
    "attention.query_key_value": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "attention.output": ("self_attn.out_proj",),
    "attention_norm": ("self_attn_layer_norm",),
    "cross_attention.query": ("encoder_attn.q_proj",),
    "cross_attention.key_value": ("encoder_attn.k_proj", "encoder_attn.v_proj"),
    "cross_attention.output": ("encoder_attn.out_proj",),
    "cross_attention_norm": ("encoder_attn_layer_norm",),
    "feed_forward.inner": ("fc1",),
    "feed_forward.outer": ("fc2",),
    "feed_forward_norm": ("final_layer_norm",),
}
#: Buffers of fairseq's state dictionaries that hold no weights.
_NO_WEIGHTS = (".version", "._float_tensor")


class Incompatible(ValueError):
    """A model of fairseq's that ours cannot be; the message says why."""


@dataclass(frozen=True)
class Names:
    """fairseq's names for a family of models.

    ``outside``: of parameters and modules that are in no layer; ``layers``: of the lists of layers; ``shared``: second
    names, each with the first, in models whose embeddings are tied.
    """

    outside: dict[str, str]
    layers: dict[str, str]
    shared: dict[str, str]

    def places(self, name: str) -> list[str]:
        """fairseq's names of the pieces, in their order, that one of our parameters consists of."""
        if name in self.outside:
            return [self.outside[name]]
        module, _, kind = name.rpartition(".")
        if module in self.outside:
            return [f"{self.outside[module]}.{kind}"]
        match = re.fullmatch(r"(.*layers)\.(\d+)\.(.*)", module)
        assert match is not None, name
        return [f"{self.layers[match[1]]}.{match[2]}.{piece}.{kind}" for piece in _IN_A_LAYER[match[3]]]


_SENTENCES, _HEAD = "encoder.sentence_encoder", "encoder.lm_head"

#: `MaskedLM` as RobertaModel.
ROBERTA = Names(
    outside={
        "encoder.embedding": f"{_SENTENCES}.embed_tokens",
        "encoder.positions": f"{_SENTENCES}.embed_positions.weight",
        "encoder.embedding_norm": f"{_SENTENCES}.layernorm_embedding",
        "encoder.final_norm": f"{_SENTENCES}.layer_norm",
        "head": f"{_HEAD}.dense", "head_norm": f"{_HEAD}.layer_norm", "bias": f"{_HEAD}.bias",
        "output_embedding": _HEAD,
    },
    layers={"encoder.layers": f"{_SENTENCES}.layers"},
    shared={f"{_HEAD}.weight": f"{_SENTENCES}.embed_tokens.weight"},
)  # fmt: skip

#: `Translator` as TransformerModel with --share-all-embeddings or, untied, without any sharing.
TRANSFORMER = Names(
    outside={
        "embedding": "encoder.embed_tokens", "target_embedding": "decoder.embed_tokens",
        "output_embedding": "decoder.output_projection",
        "source_positions": "encoder.embed_positions.weight", "target_positions": "decoder.embed_positions.weight",
        "encoder.final_norm": "encoder.layer_norm", "decoder.final_norm": "decoder.layer_norm",
    },
    layers={"encoder.layers": "encoder.layers", "decoder.layers": "decoder.layers"},
    shared=dict.fromkeys(
        ("decoder.embed_tokens.weight", "decoder.output_projection.weight"), "encoder.embed_tokens.weight"
    ),
)  # fmt: skip


def to_fairseq(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """Our parameters, all or some, as fairseq's; views of ours wherever they can be."""
    theirs: dict[str, Tensor] = {}
    for name, value in weights.items():
        if name.endswith("positions"):
            value = torch.cat([value.new_zeros(FIRST_POSITION, value.shape[1]), value])
        places = names.places(name)
        theirs.update(zip(places, value.chunk(len(places)), strict=True))
    return {second: theirs[first] for second, first in names.shared.items() if first in theirs} | theirs


def state_dict(weights: Mapping[str, Tensor], names: Names) -> dict[str, Tensor]:
    """`to_fairseq` as fairseq's ``load_state_dict`` wants it.

    Without a version it takes the weights for those of an early release, and drops the last normalization.
    """
    versions = {name.removesuffix("layers") + "version": torch.tensor([3.0]) for name in names.layers.values()}
    return {name: value.detach().clone() for name, value in to_fairseq(weights, names).items()} | versions


def from_fairseq(theirs: Mapping[str, Tensor], names: Names, ours: Iterable[str]) -> dict[str, Tensor]:
    """fairseq's parameters (or their gradients) as ours of the names ``ours``.

    Raises `Incompatible` where some are missing, or have no place here.
    """
    places = {name: names.places(name) for name in ours}
    used = {place for pieces in places.values() for place in pieces}
    if missing := sorted(used - theirs.keys()):
        raise Incompatible(f"it has no {missing[0]}")
    rest = [name for name in theirs if name not in used and not name.endswith(_NO_WEIGHTS)]
    for name in rest:
        if name not in names.shared:
            raise Incompatible(f"its {name} has no counterpart here")
        if not torch.equal(theirs[name], theirs[names.shared[name]]):
            raise Incompatible(
                f"its {name} is not tied to {names.shared[name]}, as it is in a model with model.tied=true"
            )
    found = {name: torch.cat([theirs[place] for place in pieces]) for name, pieces in places.items()}
    return {name: value[FIRST_POSITION:] if name.endswith("positions") else value for name, value in found.items()}
