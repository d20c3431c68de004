"""Shared parts of prompt tuning, p-tuning and prefix tuning: trained vectors at the first positions of every sequence.

Every sequence begins with `tokens` placeholder ids (virtual tokens), and at positions below `tokens` the trained vectors replace
the model's own: in the embedding, or in each layer's keys and values. Position ids restart in every sequence, so packed, padded
and cached sequences all work without further code.

The adapter's folder is peft's own (one tensor `prompt_embeddings`), so `PeftModel.from_pretrained` loads it.
"""

from __future__ import annotations

from abc import abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import Field

from app.languages import gettext, mark
from app.shapes import Shape
from app.strategies._base import Kept, Loading, Strategy
from app.strategies._files import read_weights, write_adapter
from app.strategies._model import LayerNotes, NotesOfThreads, attention, backbone, blocks, place_for_notes, transformer

if TYPE_CHECKING:
    import torch

NAME = "luthier_prompt"


class SoftPrompt(Strategy):
    family: ClassVar = "additive"
    tasks: ClassVar = ("generation", "classification", "preference")
    no_blend: ClassVar = mark(
        "its trained vectors are put before the text or they are not; half of each is another prompt that was never trained."
    )

    tokens: int = Field(
        20,
        ge=1,
        le=1024,
        description=mark("Number of trained vectors (virtual tokens). Each takes one token of the context."),
        json_schema_extra={"basic": True},
    )

    def virtual_tokens(self) -> int:
        return self.tokens

    def trains_in_bf16(self) -> bool:
        return True  # trained vectors stay in float32; the model computes as in full fine-tuning

    def unavailable(self, shape: Shape, *, task: str = "generation", cuda: bool = False) -> str | None:
        if self.tokens >= shape.positions:
            return gettext(
                "The model reads %(most)s tokens at once; %(trained)s trained ones leave no room. Choose fewer.",
                most=shape.positions,
                trained=self.tokens,
            )
        return super().unavailable(shape, task=task, cuda=cuda)

    def activation_counts(self, shape: Shape) -> Kept:
        return Kept(0)

    @abstractmethod
    def table(self, model: torch.nn.Module) -> torch.nn.Module:
        """A module without inputs whose output is the trained vectors, (tokens, width), as saved."""

    @abstractmethod
    def peft_config(self, model: torch.nn.Module) -> Any:
        """The `peft.PeftConfig` with which the saved tensor loads elsewhere."""

    @abstractmethod
    def install(self, model: torch.nn.Module, table: torch.nn.Module) -> None:
        """Register the hooks that put the table's output into the model."""

    def attach(self, model: torch.nn.Module, *, task: str = "generation", labels: int = 0) -> torch.nn.Module:
        model.requires_grad_(False)
        self._hang(model, self.table(model))
        return model

    def _hang(self, model: torch.nn.Module, table: torch.nn.Module) -> None:
        body = backbone(model)
        device = next(body.parameters()).device
        body.add_module(NAME, table.to(device))
        object.__setattr__(table, "notes", place_for_notes(device))
        body.register_forward_pre_hook(_remember_positions, with_kwargs=True)
        self.install(model, table)

    def save(self, model: torch.nn.Module, folder: Path) -> None:
        trained = getattr(backbone(model), NAME)()
        write_adapter(folder, self.peft_config(model).to_dict() | {"inference_mode": True}, {"prompt_embeddings": trained})

    def load(self, model: torch.nn.Module, folder: Path) -> torch.nn.Module:
        table = make_table(read_weights(folder)["prompt_embeddings"])
        self._hang(model, table.requires_grad_(False))
        return model

    def loading(self, *, task: str = "generation") -> Loading:
        return Loading(("from peft import PeftModel",), "model = PeftModel.from_pretrained(model, folder)")


def task_type(model: torch.nn.Module) -> str:
    """peft's task type for the model: with or without a language-model head."""
    return "CAUSAL_LM" if transformer(model).get_output_embeddings() is not None else "FEATURE_EXTRACTION"


def make_table(start: torch.Tensor) -> torch.nn.Module:
    """A table whose rows are trained directly."""
    import torch

    class Table(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = torch.nn.Parameter(start.detach().clone().float())

        def forward(self) -> torch.Tensor:
            return self.rows

    return Table()


def _remember_positions(body: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Store the position ids, (B, T), of this call's tokens for the hooks of the layers, and compute the table once, in float32
    as it is saved. Without `position_ids` they count from the length of the cache."""
    import torch

    positions = kwargs.get("position_ids")
    if positions is None:
        tokens = args[0] if args else kwargs.get("input_ids")
        if tokens is None:
            tokens = kwargs["inputs_embeds"]
        cache = kwargs.get("past_key_values")
        past = cache.get_seq_length() if cache is not None else 0
        positions = torch.arange(past, past + tokens.shape[1], device=tokens.device)[None].expand(tokens.shape[0], -1)
    table = getattr(body, NAME)
    table.notes.positions = positions
    with torch.autocast(positions.device.type, enabled=False):
        table.notes.output = table()
    return args, kwargs


def install_in_embedding(model: torch.nn.Module, table: torch.nn.Module) -> None:
    embedding = transformer(model).get_input_embeddings()
    object.__setattr__(embedding, NAME, table)  # a plain attribute: the table belongs to the backbone
    embedding.register_forward_hook(_into_embedding)


def _into_embedding(embedding: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """(B, T, H) with the trained vectors at positions below their number."""
    import torch

    table = getattr(embedding, NAME)
    trained, positions = table.notes.output.to(output.dtype), table.notes.positions.expand(output.shape[0], -1)
    here = positions < trained.shape[0]
    return torch.where(here[..., None], trained[positions.clamp(max=trained.shape[0] - 1)], output)


def install_in_attention(model: torch.nn.Module, table: torch.nn.Module) -> None:
    for block in blocks(model):
        layer = attention(block)
        object.__setattr__(layer, NAME, table)
        layer.register_forward_pre_hook(_into_cache, with_kwargs=True)


def _into_cache(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    return args, {**kwargs, "past_key_values": _PrefixedCache(kwargs.get("past_key_values"), getattr(layer, NAME), layer)}


class _Noted(Protocol):
    """A table with what the hooks leave for each other."""

    notes: LayerNotes | NotesOfThreads


class _PrefixedCache:
    """Wraps the cache of one attention call and inserts the trained keys and values."""

    def __init__(self, cache: Any, table: _Noted, layer: torch.nn.Module) -> None:
        self.cache, self.table, self.layer = cache, table, layer

    def __getattr__(self, name: str) -> Any:
        return getattr(self.cache, name)

    def update(self, keys: torch.Tensor, values: torch.Tensor, layer: int, *args: Any, **kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        """keys and values: (B, Hkv, T, D). A row of the table has layers · 2 · Hkv · D values, a layer's key first."""
        import torch

        heads, width = keys.shape[1], keys.shape[3]
        trained = self.table.notes.output.view(self.table.notes.output.shape[0], -1, heads, width).to(keys.dtype)
        positions = self.table.notes.positions.expand(keys.shape[0], -1)
        here = (positions < trained.shape[0])[:, None, :, None]
        rows = trained[positions.clamp(max=trained.shape[0] - 1)]  # (B, T, layers · 2, Hkv, D)
        keys = torch.where(here, rows[:, :, 2 * layer].transpose(1, 2), keys)
        values = torch.where(here, rows[:, :, 2 * layer + 1].transpose(1, 2), values)
        return (keys, values) if self.cache is None else self.cache.update(keys, values, layer, *args, **kwargs)
