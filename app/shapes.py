"""A model's architecture, read from its config.json, and arithmetic on it. No torch.

Parameter counts are exact for the supported architectures; a test compares each with the model itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict

from app.errors import BadData


class Linear(NamedTuple):
    """One linear layer of every block: its name in the block, its dimensions, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool


class Shape(BaseModel):
    """What the arithmetic needs to know of a transformer. Lengths in tokens, widths in numbers."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    model_type: str
    architecture: Literal["decoder", "encoder"]
    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    positions: int
    tied: bool
    gated: bool
    attention_bias: bool = False
    mlp_bias: bool = False
    norm_bias: bool = False
    norms_per_layer: int = 2
    qk_norm: bool = False
    learned_positions: bool = False
    token_types: int = 0
    pooler: bool = False
    sliding_window: int | None = None

    def linears(self) -> list[Linear]:
        """The linear layers of one block, under the names the model gives them."""
        q, kv, h, m = self.heads * self.head_dim, self.kv_heads * self.head_dim, self.hidden, self.intermediate
        if self.architecture == "encoder":
            return [
                Linear("query", h, q, True), Linear("key", h, kv, True), Linear("value", h, kv, True),
                Linear("attention.output.dense", q, h, True),
                Linear("intermediate.dense", h, m, True), Linear("output.dense", m, h, True),
            ]  # fmt: skip
        out_bias = self.attention_bias and self.model_type not in ("qwen2",)
        attention = [
            Linear("q_proj", h, q, self.attention_bias), Linear("k_proj", h, kv, self.attention_bias),
            Linear("v_proj", h, kv, self.attention_bias), Linear("o_proj", q, h, out_bias),
        ]  # fmt: skip
        gate = [Linear("gate_proj", h, m, self.mlp_bias)] if self.gated else []
        return [*attention, *gate, Linear("up_proj", h, m, self.mlp_bias), Linear("down_proj", m, h, self.mlp_bias)]

    def norm_parameters(self) -> int:
        """Parameters of all norms."""
        per_norm = self.hidden * (2 if self.norm_bias else 1)
        per_layer = self.norms_per_layer * per_norm + (2 * self.head_dim if self.qk_norm else 0)
        return self.layers * per_layer + per_norm  # the last one: final norm of a decoder, embedding norm of an encoder

    def layer_parameters(self) -> int:
        """Parameters of one block, norms included."""
        linear = sum(x.inputs * x.outputs + (x.outputs if x.bias else 0) for x in self.linears())
        norms = self.norms_per_layer * self.hidden * (2 if self.norm_bias else 1)
        return linear + norms + (2 * self.head_dim if self.qk_norm else 0)

    def embedding_parameters(self) -> int:
        rows = self.positions + (RESERVED_POSITIONS if self.model_type in COUNTED_FROM_PADDING else 0)
        positions = rows * self.hidden if self.learned_positions else 0
        return self.vocabulary * self.hidden + positions + self.token_types * self.hidden

    def body_parameters(self) -> int:
        """Parameters of the stack without head and pooler: a classifier's backbone."""
        final_norm = self.hidden * (2 if self.norm_bias else 1)
        return self.embedding_parameters() + self.layers * self.layer_parameters() + final_norm

    def parameters(self) -> int:
        """All parameters, the head counted once when it is tied to the embedding."""
        head = 0 if self.tied or self.architecture == "encoder" else self.vocabulary * self.hidden
        pooler = self.hidden * self.hidden + self.hidden if self.pooler else 0
        final_norm = self.hidden * (2 if self.norm_bias else 1)
        return self.embedding_parameters() + self.layers * self.layer_parameters() + final_norm + head + pooler

    def matmul_parameters(self) -> int:
        """Weights that take part in a matrix product for every token: the blocks' linear layers and the head."""
        head = self.vocabulary * self.hidden if self.architecture == "decoder" else 0
        return self.layers * sum(x.inputs * x.outputs for x in self.linears()) + head

    def layer_inputs(self) -> int:
        """Input values per token of the linear layers of one block; layers that share an input count once."""
        return 2 * self.hidden + self.heads * self.head_dim + self.intermediate

    def layer_outputs(self) -> int:
        """Output values per token of the linear layers of one block."""
        return sum(x.outputs for x in self.linears())

    def modules(self) -> Iterator[tuple[str, Linear]]:
        """Every linear layer of the blocks under its full name in the model."""
        for block in range(self.layers):
            for linear in self.linears():
                if self.architecture == "encoder":
                    inside = "attention.self." if linear.name in ("query", "key", "value") else ""
                    yield f"encoder.layer.{block}.{inside}{linear.name}", linear
                else:
                    inside = "self_attn" if linear.name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                    yield f"model.layers.{block}.{inside}.{linear.name}", linear

    def each_linear(self) -> Iterator[Linear]:
        for _ in range(self.layers):
            yield from self.linears()


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape of a Hugging Face `config.json`. Raises BadData naming the key that is missing."""
    try:
        kind = config["model_type"]
        if kind in _ENCODERS:
            return _encoder(config)
        return _decoder(config)
    except KeyError as missing:
        raise BadData(
            f"The model's config.json has no {missing.args[0]!r}, which Luthier needs to know its size.",
            hint="Use a folder saved by transformers' save_pretrained().",
        ) from None


COUNTED_FROM_PADDING, RESERVED_POSITIONS = ("roberta", "xlm-roberta", "mpnet"), 2
"""Encoders whose position ids start above the padding index, so that two rows of their position table are unused."""
_ENCODERS = ("bert", "roberta", "distilbert", "xlm-roberta", "mpnet", "electra")


def _decoder(c: dict[str, Any]) -> Shape:
    kind, heads, hidden = c["model_type"], c["num_attention_heads"], c["hidden_size"]
    gemma3 = kind in ("gemma3_text", "gemma2")
    return Shape(
        model_type=kind,
        architecture="decoder",
        layers=c["num_hidden_layers"],
        hidden=hidden,
        intermediate=c["intermediate_size"],
        heads=heads,
        kv_heads=c.get("num_key_value_heads") or heads,
        head_dim=c.get("head_dim") or hidden // heads,
        vocabulary=c["vocab_size"],
        positions=c.get("max_position_embeddings", 2048),
        tied=c.get("tie_word_embeddings", kind.startswith("gemma")),
        gated=True,
        attention_bias=c.get("attention_bias", kind == "qwen2"),
        mlp_bias=c.get("mlp_bias", False),
        norms_per_layer=4 if gemma3 else 2,
        qk_norm=kind in ("gemma3_text", "qwen3"),
        sliding_window=c.get("sliding_window") if c.get("use_sliding_window", True) else None,
    )


def _encoder(c: dict[str, Any]) -> Shape:
    heads, hidden = c["num_attention_heads"], c["hidden_size"]
    return Shape(
        model_type=c["model_type"],
        architecture="encoder",
        layers=c["num_hidden_layers"],
        hidden=hidden,
        intermediate=c["intermediate_size"],
        heads=heads,
        kv_heads=heads,
        head_dim=hidden // heads,
        vocabulary=c["vocab_size"],
        positions=c["max_position_embeddings"] - (RESERVED_POSITIONS if c["model_type"] in COUNTED_FROM_PADDING else 0),
        tied=False,
        gated=False,
        attention_bias=True,
        mlp_bias=True,
        norm_bias=True,
        learned_positions=True,
        token_types=c.get("type_vocab_size", 0),
        pooler=True,
    )
