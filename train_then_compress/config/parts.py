"""The parts of a model by the names of its modules and parameters: what compression, calibration and costs go by."""

from __future__ import annotations

#: What holds layers; only a translator has both.
SIDES = ("encoder", "decoder")


#: What has a row for each token: looked up (a translation's target in its own, if there is one), or scoring tokens.
EMBEDDINGS = {"embedding", "target_embedding", "output_embedding"}


def in_embedding(name: str) -> bool:
    """Whether it belongs to an embedding of tokens, of full rank or factored."""
    return not EMBEDDINGS.isdisjoint(name.split("."))


def in_layers(name: str) -> bool:
    """Whether it belongs to a layer of an encoder or a decoder."""
    return ".layers." in name


def reads_target(name: str) -> bool:
    """Whether it works on a translation's target: in the decoder all but what makes keys and values of the source."""
    return name.startswith("decoder.") and ".cross_attention.key_value" not in name
