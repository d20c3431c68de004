"""New tokens: strings that a job adds to its model's vocabulary, one token each.

Their rows of the embedding and of the head begin as the mean of the pieces that each string was split into before (Hewitt 2021,
https://nlp.stanford.edu/~johnhew/vocab-expansion.html, takes the mean of all rows), and learn whatever else a strategy trains. A strategy that
keeps the tables frozen trains `LearnedRows` beside them: after each step these are written into the table, so that everything that reads the
table reads the rows as they are.

An adapter's folder has them in `NEW_TOKENS`: `ids` (n,), `embedding` (n, H) and, where the head has weights of its own, `head` (n, H), with the
head's bias in `bias` (n,). A whole model has them in its tables.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from app.errors import BadData
from app.shapes import STRUCTURE, Shape
from app.strategies._files import NEW_TOKENS
from app.strategies._model import transformer
from worker.modeling.cross_entropy import ROWS

_IDS = "luthier_new_ids"
"""Name of a buffer of the embedding: the ids (n,) of the tokens that this job added."""


class AddedTokens(NamedTuple):
    """Tokens with the ids `first`, `first` + 1, … and the ids of the pieces that each was split into before."""

    first: int
    pieces: list[list[int]]

    @property
    def ids(self) -> torch.Tensor:
        return torch.arange(self.first, self.first + len(self.pieces))


# The tokenizer --------------------------------------------------------------------------------------------------------


def add_to(tokenizer: Any, tokens: Sequence[str]) -> AddedTokens:
    """Add tokens to a tokenizer of transformers, which finds them anywhere in a text, also within words. Raises BadData naming one that it has
    already, or that would swallow a special token."""
    from transformers import AddedToken

    pieces = [tokenizer(token, add_special_tokens=False)["input_ids"] for token in tokens]
    known = tokenizer.get_vocab()
    for token, parts in zip(tokens, pieces, strict=True):
        if not parts:
            raise BadData(f"The model's tokenizer drops “{token}” from a text.", hint="Omit it from new_tokens.")
        if token in known or (len(parts) == 1 and parts != [tokenizer.unk_token_id]):
            raise BadData(f"The model has a token for “{token}” already.", hint="Omit it from new_tokens.")
        if special := next((s for s in tokenizer.all_special_tokens if s in token), None):
            raise BadData(f"“{token}” contains the special token {special}, which would no longer be found.", hint="Spell it differently.")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])
    ids = tokenizer.convert_tokens_to_ids(list(tokens))
    if ids != list(range(ids[0], ids[0] + len(ids))) or ids[0] <= max(known.values()):
        raise BadData("The model's tokenizer gives new tokens ids that are used.", hint="Leave new_tokens out, or choose another model.")
    return AddedTokens(ids[0], pieces)


# The tables -----------------------------------------------------------------------------------------------------------


def widen(model: torch.nn.Module, added: AddedTokens) -> None:
    """Give a model without a strategy the rows of new tokens, as the mean of their pieces. Raises BadData for a model that has further tables of
    its vocabulary."""
    embedding, head = _tables(model)
    _refuse_other_tables(model, embedding)
    found = {"embedding": _means(embedding.weight, added.pieces)}
    if head.weight is not embedding.weight:
        found["head"] = _means(head.weight, added.pieces)
    if getattr(head, "bias", None) is not None:
        found["bias"] = _means(head.bias[:, None], added.pieces)[:, 0]
    _put(model, added.ids, found)
    embedding.register_buffer(_IDS, added.ids, persistent=False)


def load(model: torch.nn.Module, folder: Path) -> None:
    """Give a model the rows that an adapter's folder has; nothing where it has none. The model's own tensors are not written to."""
    if (folder / NEW_TOKENS).is_file():
        rows = load_file(folder / NEW_TOKENS)
        _put(model, rows.pop("ids"), rows)


def save(model: torch.nn.Module, folder: Path) -> None:
    """Write the rows of the tokens that a job added to its model; nothing where it added none."""
    embedding, head = _tables(model)
    ids = getattr(embedding, _IDS, None)
    if ids is None:
        return
    found = {"ids": ids.cpu(), "embedding": embedding.weight[ids]}
    if head.weight is not embedding.weight:
        found["head"] = head.weight[ids]
    if getattr(head, "bias", None) is not None:
        found["bias"] = head.bias[ids]
    save_file({name: rows.detach().cpu().contiguous() for name, rows in found.items()}, folder / NEW_TOKENS)


def _tables(model: torch.nn.Module) -> tuple[torch.nn.Embedding, torch.nn.Linear]:
    whole = transformer(model)
    return cast("torch.nn.Embedding", whole.get_input_embeddings()), cast("torch.nn.Linear", whole.get_output_embeddings())


def _sharing(model: torch.nn.Module, embedding: torch.nn.Embedding) -> list[torch.nn.Embedding]:
    """The embeddings with this one's table, itself among them: an encoder–decoder has one in each stack."""
    return [m for m in model.modules() if isinstance(m, torch.nn.Embedding) and m.weight is embedding.weight]


def _refuse_other_tables(model: torch.nn.Module, embedding: torch.nn.Embedding) -> None:
    for name, module in model.named_modules():
        further = isinstance(module, torch.nn.Embedding) and module.weight is not embedding.weight and "pos" not in name
        if further and module.num_embeddings >= embedding.num_embeddings:
            raise BadData(
                f"The model has a second table of its vocabulary ({name}), for which new tokens have no rows.", hint="Leave new_tokens out."
            )


@torch.no_grad()
def _means(table: torch.Tensor, pieces: list[list[int]]) -> torch.Tensor:
    return torch.stack([table[parts].float().mean(0) for parts in pieces]).to(table.dtype)


@torch.no_grad()
def _put(model: torch.nn.Module, ids: torch.Tensor, rows: dict[str, torch.Tensor]) -> None:
    """New tensors in place of a model's tables, with these rows at `ids`: as large as before where they had room, or longer."""
    embedding, head = _tables(model)
    before, size = embedding.num_embeddings, max(embedding.num_embeddings, int(ids.max()) + 1)
    tied = head.weight is embedding.weight
    layers, longer = _sharing(model, embedding), _longer(embedding.weight, size, ids, rows["embedding"])
    for layer in layers:
        layer.weight, layer.num_embeddings = longer, size
    head.weight = longer if tied else _longer(head.weight, size, ids, rows["head"])
    if getattr(head, "bias", None) is not None:
        head.bias = _longer(head.bias, size, ids, rows["bias"])
    head.out_features = size
    whole = transformer(model)
    if (fixed := whole._buffers.get("final_logits_bias")) is not None:  # of BART and its relatives
        whole._buffers["final_logits_bias"] = F.pad(fixed, (0, size - before))
    of_head = (0 if tied else head.in_features) + (getattr(head, "bias", None) is not None)
    _tell_config(model, size, (size - before) * (embedding.embedding_dim + of_head))


def _longer(table: torch.Tensor, size: int, ids: torch.Tensor, rows: torch.Tensor) -> torch.nn.Parameter:
    longer = table.new_zeros(size, *table.shape[1:])
    longer[: len(table)] = table
    longer[ids.to(table.device)] = rows.to(longer)
    return torch.nn.Parameter(longer, requires_grad=table.requires_grad)


def _tell_config(model: torch.nn.Module, size: int, more: int) -> None:
    """Write the size of the vocabulary, and `more` parameters in the tables, where a saved model says them."""
    config = transformer(model).config
    config.get_text_config().vocab_size = size
    for part in (model, transformer(model).base_model):
        if isinstance(getattr(part, "vocab_size", None), int):
            part.vocab_size = size  # type: ignore[assignment]
    if kept := getattr(config, STRUCTURE, None):
        shape = Shape.model_validate(kept)
        setattr(config, STRUCTURE, shape.with_vocabulary(size, more).model_dump(mode="json"))


# Rows that learn ------------------------------------------------------------------------------------------------------


class LearnedRows(torch.nn.Module):
    """The rows (n, H) of new tokens in a table that is frozen, in float32. `scale` is what the layer multiplies its rows by."""

    layer: torch.nn.Embedding | torch.nn.Linear

    def __init__(self, layer: torch.nn.Embedding | torch.nn.Linear, rows: torch.nn.Parameter, first: int, scale: float = 1.0) -> None:
        super().__init__()
        self.rows, self.first, self.scale = rows, first, scale
        object.__setattr__(self, "layer", layer)  # a plain attribute: these rows are a submodule of the layer

    @torch.no_grad()
    def write(self) -> None:
        """Put the rows into the table. Not seen by autograd: no graph is alive between two steps."""
        self.layer.weight.data[self.first : self.first + len(self.rows)] = self.rows.to(self.layer.weight.dtype)


def learn(model: torch.nn.Module) -> list[LearnedRows]:
    """Have the rows of the tokens that a job added learn, in a model with its strategy attached: one matrix for each table that the strategy
    keeps frozen."""
    embedding, head = _tables(model)
    ids = cast("torch.Tensor", getattr(embedding, _IDS))
    first, count = int(ids[0]), len(ids)
    found: list[LearnedRows] = []
    if not embedding.weight.requires_grad:
        rows = torch.nn.Parameter(embedding.weight.detach()[ids].float().clone())
        for layer in _sharing(model, embedding):
            found.append(LearnedRows(layer, rows, first, _scale_of(layer, first)))
            layer.register_forward_hook(_with_gradient)
    if not head.weight.requires_grad:
        tied = bool(found) and head.weight is embedding.weight
        rows = found[0].rows if tied else torch.nn.Parameter(head.weight.detach()[first : first + count].float().clone())
        found.append(LearnedRows(head, rows, first))
    for one in found:
        one.layer.add_module(ROWS, one)
    return found


@torch.no_grad()
def _scale_of(embedding: torch.nn.Embedding, first: int) -> float:
    """By how much an embedding multiplies its rows: Gemma's by the root of the width."""
    row = embedding.weight[first].float()
    norm = float(row.norm())
    given = torch.tensor([first], device=row.device)
    return float(type(embedding).forward(embedding, given)[0].float().norm()) / norm if norm else 1.0


def _with_gradient(embedding: torch.nn.Module, args: tuple[Any, ...], output: torch.Tensor) -> torch.Tensor:
    """(B, T, H) unchanged, with a gradient for the learned rows."""
    if not torch.is_grad_enabled():
        return output
    new = cast("LearnedRows", getattr(embedding, ROWS))
    places = args[0] - new.first
    here = (places >= 0) & (places < len(new.rows))
    read = F.embedding(places.clamp(0, len(new.rows) - 1), new.rows) * new.scale
    return output + ((read - read.detach()) * here[..., None]).to(output.dtype)
