"""``conf/model``: the shape of the Transformer."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Discriminator, Field, Tag, model_validator

from train_then_compress.config.base import config_dataclass, reject


@config_dataclass
class ModelShape:
    """What every Transformer has: layers of ``width`` units, FFN of ``4 * width``.

    ``tied``: scores of tokens are made by the matrix that tokens are looked up in (Press & Wolf 2017), in a translator
    one for both languages; else by a matrix of their own, and a translator looks up either language in another.
    ``impl``: whose code computes; ``fairseq`` holds the same parameters under the same names.
    """

    width: int = Field(768, ge=2, le=16384)
    head_size: int = Field(64, ge=2)
    positions: Literal["learned", "sinusoidal", "rotary"] = "learned"
    norm: Literal["pre", "post"] = "pre"
    dropout: float = Field(0.0, ge=0, lt=1)
    tied: bool = True
    impl: Literal["native", "fairseq"] = "native"

    @property
    def heads(self) -> int:
        """Width / head size, at least one."""
        return max(1, self.width // self.head_size)

    @model_validator(mode="after")
    def _shape_is_possible(self) -> ModelShape:
        if self.width > self.head_size and self.width % self.head_size:
            raise reject("model.width", self.width, f"must be a multiple of model.head_size={self.head_size}")
        if self.positions == "rotary" and (self.width // self.heads) % 2:
            raise reject("model.head_size", self.width // self.heads, "rotary positions need an even head size")
        if self.positions == "sinusoidal" and self.width % 2:
            raise reject("model.width", self.width, "sinusoidal positions need an even width")
        return self


@config_dataclass
class RobertaConfig(ModelShape):
    """A RoBERTa encoder of ``depth`` layers."""

    name: Literal["roberta"] = "roberta"
    depth: int = Field(12, ge=1, le=48)

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of the encoder."""
        return (self.depth,)

    @property
    def depth_name(self) -> str:
        """As it stands in a run's name."""
        return str(self.depth)

    def matrix_weights(self, vocab_size: int) -> int:
        """Weights in matrices: 12 width^2 a layer, the embedding or both, the head's dense layer."""
        embeddings = 1 if self.tied else 2
        return self.depth * 12 * self.width**2 + (embeddings * vocab_size + self.width) * self.width


@config_dataclass
class TransformerConfig(ModelShape):
    """The Transformer for translation: ``depth`` layers in the encoder and as many in the decoder, unless set apart.

    ``length``: tokens of the longest sentence of either side, ``</s>`` included.
    """

    name: Literal["transformer"] = "transformer"
    depth: int = Field(6, ge=1, le=48)
    encoder_depth: int | None = Field(None, ge=1, le=48)
    decoder_depth: int | None = Field(None, ge=1, le=48)
    width: int = Field(512, ge=2, le=16384)
    positions: Literal["learned", "sinusoidal", "rotary"] = "sinusoidal"
    dropout: float = Field(0.1, ge=0, lt=1)
    length: int = Field(1024, ge=16, le=16384)

    @property
    def encoder_layers(self) -> int:
        """Layers of the encoder."""
        return self.encoder_depth or self.depth

    @property
    def decoder_layers(self) -> int:
        """Layers of the decoder."""
        return self.decoder_depth or self.depth

    @property
    def depths(self) -> tuple[int, ...]:
        """Layers of the encoder and of the decoder."""
        return self.encoder_layers, self.decoder_layers

    @property
    def depth_name(self) -> str:
        """As it stands in a run's name: one number, or the encoder's and the decoder's where they differ."""
        return ".".join(map(str, dict.fromkeys(self.depths)))

    def matrix_weights(self, vocab_size: int) -> int:
        """Weights in matrices: 12 width^2 an encoder layer, 16 width^2 a decoder layer, one embedding or three."""
        layers = 12 * self.encoder_layers + 16 * self.decoder_layers
        return layers * self.width**2 + (1 if self.tied else 3) * vocab_size * self.width


def _architecture(value: Any) -> str:
    """A model without a name is RoBERTa."""
    return str(value.get("name", "roberta") if isinstance(value, dict) else getattr(value, "name", ""))


ModelConfig = Annotated[
    Annotated[RobertaConfig, Tag("roberta")] | Annotated[TransformerConfig, Tag("transformer")],
    Discriminator(_architecture),
]
