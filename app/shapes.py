"""A model's architecture, and arithmetic on it. No torch.

For the architectures in `FORMULAS` everything follows from config.json, and a test compares each count with the model itself. Of any
other architecture the structure is read from the model when it is added (`worker/conversion/structure.py`) and kept in its
config.json under `STRUCTURE`, so that `shape_of` gives its shape from the same file.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

from pydantic import BaseModel, ConfigDict, Field

from app.errors import BadData
from app.languages import gettext


class Linear(NamedTuple):
    """One linear layer of every block: its name in the block, its dimensions, and whether it has a bias."""

    name: str
    inputs: int
    outputs: int
    bias: bool


class Block(BaseModel):
    """One kind of layer as found in a model: its linear layers by their names in it, and the parameters of all its modules, of its
    norms, of all biases, and of its routed experts, of which a token passes `expert_share`."""

    model_config = ConfigDict(frozen=True)

    linears: tuple[Linear, ...]
    parameters: int
    norms: int
    biases: int = 0
    experts: int = 0
    expert_share: float = 1.0


class MeasuredStep(BaseModel):
    """What a step was measured to keep and take when the model was added (`worker/evaluation/step_cost.py`), in float32 on a CPU with so many
    `threads`, with all weights frozen: bytes of all layers per token, and per pair of a text's tokens, and operations per second."""

    model_config = ConfigDict(frozen=True)

    bytes_per_token: float
    bytes_per_pair: float
    operations_per_second: float
    threads: int


class Structure(BaseModel):
    """The stack of a model as found in it. Names count from the model with its head, as `model.layers`."""

    model_config = ConfigDict(frozen=True)

    kinds: tuple[Block, ...]
    order: tuple[int, ...]  # for each layer its kind
    stack: str  # of the list of layers
    final_norm: str = ""  # of the norm after them; empty where there is none
    final_norm_parameters: int = 0
    embedding: int  # parameters before the first layer
    head: int = 0  # of an output layer with weights of its own, or of an encoder's pooler
    parameters: int  # all, each once
    packs: bool = True  # false: a pack does not give the states of its texts alone, so it is read as a padded batch
    refused: tuple[tuple[str, str], ...] = ()  # strategies that failed when the model was added, each with the reason
    step: MeasuredStep | None = Field(None, exclude_if=lambda step: step is None)
    # An encoder–decoder: the list of its encoder's layers, which are the first so many of `order`; `stack` is the decoder's.
    encoder_stack: str = Field("", exclude_if=lambda name: not name)
    encoder_layers: int = Field(0, exclude_if=lambda count: not count)

    def layers(self) -> Iterator[Block]:
        for kind in self.order:
            yield self.kinds[kind]

    def name_of(self, layer: int) -> str:
        """The name of a layer in the model."""
        own = layer - self.encoder_layers
        return f"{self.stack}.{own}" if own >= 0 else f"{self.encoder_stack}.{layer}"


@functools.lru_cache(maxsize=256)
def _block(
    architecture: str, model_type: str, h: int, m: int, q: int, kv: int, gated: bool, attention_bias: bool, mlp_bias: bool
) -> tuple[Linear, ...]:
    """The linear layers of one block of an architecture with formulas: widths of the states, of the MLP, of queries and of keys. An estimate
    asks for them hundreds of times."""
    if architecture == "encoder":
        return (
            Linear("query", h, q, True), Linear("key", h, kv, True), Linear("value", h, kv, True),
            Linear("attention.output.dense", q, h, True),
            Linear("intermediate.dense", h, m, True), Linear("output.dense", m, h, True),
        )  # fmt: skip
    out_bias = attention_bias and model_type not in ("qwen2",)
    attention = (
        Linear("q_proj", h, q, attention_bias), Linear("k_proj", h, kv, attention_bias),
        Linear("v_proj", h, kv, attention_bias), Linear("o_proj", q, h, out_bias),
    )  # fmt: skip
    gate = (Linear("gate_proj", h, m, mlp_bias),) if gated else ()
    return (*attention, *gate, Linear("up_proj", h, m, mlp_bias), Linear("down_proj", m, h, mlp_bias))


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
    structure: Structure | None = Field(None, exclude_if=lambda found: found is None)

    def linears(self) -> list[Linear]:
        """The linear layers of one block, under the names the model gives them; where blocks differ, of all kinds together."""
        if self.structure:
            return list({linear.name: linear for kind in self.structure.kinds for linear in kind.linears}.values())
        return list(
            _block(
                self.architecture, self.model_type, self.hidden, self.intermediate, self.heads * self.head_dim, self.kv_heads * self.head_dim,
                self.gated, self.attention_bias, self.mlp_bias,
            )
        )  # fmt: skip

    def norm_parameters(self) -> int:
        """Parameters of all norms."""
        if self.structure:
            return sum(block.norms for block in self.structure.layers()) + self.structure.final_norm_parameters
        per_norm = self.hidden * (2 if self.norm_bias else 1)
        per_layer = self.norms_per_layer * per_norm + (2 * self.head_dim if self.qk_norm else 0)
        return self.layers * per_layer + per_norm  # the last one: final norm of a decoder, embedding norm of an encoder

    def layer_parameters(self) -> int:
        """Parameters of one block, norms included; where blocks differ, of the largest."""
        if self.structure:
            return max(kind.parameters for kind in self.structure.kinds)
        linear = sum(x.inputs * x.outputs + (x.outputs if x.bias else 0) for x in self.linears())
        norms = self.norms_per_layer * self.hidden * (2 if self.norm_bias else 1)
        return linear + norms + (2 * self.head_dim if self.qk_norm else 0)

    def top_parameters(self, count: int) -> int:
        """Parameters of the last `count` blocks."""
        if self.structure:
            return sum(block.parameters for block in list(self.structure.layers())[-count:])
        return min(count, self.layers) * self.layer_parameters()

    def biases(self) -> int:
        """Bias parameters of all blocks."""
        if self.structure:
            return sum(block.biases for block in self.structure.layers())
        norms = self.norms_per_layer * self.hidden if self.norm_bias else 0
        return self.layers * (sum(x.outputs for x in self.linears() if x.bias) + norms)

    def final_norm_parameters(self) -> int:
        """Of the norm after the last block."""
        if self.structure:
            return self.structure.final_norm_parameters
        return self.hidden * (2 if self.norm_bias else 1) if self.architecture == "decoder" else 0

    def embedding_parameters(self) -> int:
        if self.structure:
            return self.structure.embedding
        rows = self.positions + (RESERVED_POSITIONS if self.model_type in COUNTED_FROM_PADDING else 0)
        positions = rows * self.hidden if self.learned_positions else 0
        return self.vocabulary * self.hidden + positions + self.token_types * self.hidden

    def body_parameters(self) -> int:
        """Parameters of the stack without head and pooler: a classifier's backbone."""
        if self.structure:
            return self.structure.parameters - self.structure.head
        final_norm = self.hidden * (2 if self.norm_bias else 1)
        return self.embedding_parameters() + self.layers * self.layer_parameters() + final_norm

    def parameters(self) -> int:
        """All parameters, the head counted once when it is tied to the embedding."""
        if self.structure:
            return self.structure.parameters
        head = 0 if self.tied or self.architecture == "encoder" else self.vocabulary * self.hidden
        pooler = self.hidden * self.hidden + self.hidden if self.pooler else 0
        final_norm = self.hidden * (2 if self.norm_bias else 1)
        return self.embedding_parameters() + self.layers * self.layer_parameters() + final_norm + head + pooler

    def matmul_parameters(self) -> int:
        """Weights that take part in a matrix product for every token: those of the blocks and of the head."""
        return self.block_products() + (self.vocabulary * self.hidden if self.architecture == "decoder" else 0)

    def block_products(self) -> int:
        """Weights of the blocks that take part in a matrix product for every token: linear layers, and the experts it passes."""
        routed = sum(block.experts * block.expert_share for block in self.structure.layers()) if self.structure else 0
        return sum(x.inputs * x.outputs for x in self.each_linear()) + int(routed)

    def layer_inputs(self) -> int:
        """Input values per token of the linear layers of one block; layers that share an input count once."""
        return 2 * self.hidden + self.heads * self.head_dim + self.intermediate

    def layer_outputs(self) -> int:
        """Output values per token of the linear layers of one block."""
        return sum(x.outputs for x in self.linears())

    @property
    def encodes(self) -> bool:
        """Whether it is an encoder–decoder: the encoder reads a prompt, the decoder writes the answer."""
        return self.structure is not None and bool(self.structure.encoder_stack)

    @property
    def pads(self) -> bool:
        """Whether packs are read as padded batches."""
        return self.structure is not None and not self.structure.packs

    @property
    def step(self) -> MeasuredStep | None:
        return self.structure.step if self.structure else None

    def modules(self) -> Iterator[tuple[str, Linear]]:
        """Every linear layer of the blocks under its full name in the model."""
        if self.structure:
            for number, kind in enumerate(self.structure.layers()):
                name = self.structure.name_of(number)
                yield from ((f"{name}.{linear.name}", linear) for linear in kind.linears)
            return
        for block in range(self.layers):
            for linear in self.linears():
                if self.architecture == "encoder":
                    inside = "attention.self." if linear.name in ("query", "key", "value") else ""
                    yield f"encoder.layer.{block}.{inside}{linear.name}", linear
                else:
                    inside = "self_attn" if linear.name in ("q_proj", "k_proj", "v_proj", "o_proj") else "mlp"
                    yield f"model.layers.{block}.{inside}.{linear.name}", linear

    def with_vocabulary(self, size: int, more: int) -> Shape:
        """The shape of the model with a vocabulary of `size` tokens, whose tables have `more` parameters than before."""
        wider = self.model_copy(update={"vocabulary": size})
        if self.structure is None:
            return wider
        head = 0 if self.tied else more - (size - self.vocabulary) * self.hidden
        found = self.structure
        more_of = {"embedding": found.embedding + more - head, "head": found.head + head, "parameters": found.parameters + more}
        return wider.model_copy(update={"structure": found.model_copy(update=more_of)})

    def each_linear(self) -> Iterator[Linear]:
        if self.structure:
            yield from (linear for kind in self.structure.layers() for linear in kind.linears)
            return
        block = self.linears()
        for _ in range(self.layers):
            yield from block


FORMULAS = ("llama", "mistral", "qwen2", "qwen3", "gemma3_text", "bert", "roberta", "xlm-roberta")
"""Architectures (`model_type`) whose shape follows from their config.json."""
STRUCTURE = "luthier_shape"
"""Key of config.json that holds the shape of any other one."""


def shape_of(config: dict[str, Any]) -> Shape:
    """The shape of a Hugging Face `config.json`. Raises BadData naming the key that is missing."""
    if STRUCTURE in config:
        return Shape.model_validate(config[STRUCTURE])
    try:
        kind = config["model_type"]
        if kind in _ENCODERS:
            return _encoder(config)
        return _decoder(config)
    except KeyError as missing:
        raise BadData(
            gettext("The model's config.json has no %(key)s, which Luthier needs to know its size.", key=repr(missing.args[0])),
            hint=gettext("Use a folder saved by transformers' save_pretrained()."),
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
