"""Packs for models that cannot read them: each sequence of a pack becomes a row of a padded batch, and comes back as its part of the
pack. The trainer and the scorers hand over the same packs, and see the same states, as with any other model.

It is for layers that mix the tokens of a row by more than attention with positions: recurrent ones, convolutions, ALiBi. Padding costs
what it costs; rows of one pack are of similar length where the packer could choose. Encoder–decoders read packs in the same way, each of their
sequences as two rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Container, Sequence
from typing import Any, NamedTuple

import torch
from torch.nn.utils.rnn import pad_sequence

from app.strategies._model import decoder, place_for_notes, transformer

NAME = "luthier_padded"


def pad_packs(model: torch.nn.Module) -> None:
    """Let a model's stack of layers read packs as padded batches. Nothing changes for a call without lengths."""
    body = decoder(model)
    object.__setattr__(body, NAME, place_for_notes(next(body.parameters()).device))
    if encodes(model):
        object.__setattr__(body, _ENCODER, transformer(model).get_encoder())  # plain attributes: neither is a part of the decoder
        object.__setattr__(body, _EDGE, edge_of(model))
        body.register_forward_pre_hook(_to_two_sides, with_kwargs=True)
        body.register_forward_hook(_to_answers)
        return
    if body is not model:
        model.register_forward_pre_hook(_noted, with_kwargs=True)
    body.register_forward_pre_hook(_to_rows, with_kwargs=True)
    body.register_forward_hook(_to_pack)


def _noted(model: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Note the lengths of a call of the model with its head: not every class hands on arguments that it does not know."""
    if (lengths := _lengths(kwargs)) is not None:
        getattr(decoder(model), NAME).noted = lengths
    return args, kwargs


def _lengths(kwargs: dict[str, Any]) -> list[int] | None:
    """The lengths of a pack's sequences, taken out of the arguments of a call."""
    lengths: list[int] | None = kwargs.pop("sequence_lengths", None)
    ends = kwargs.pop("cu_seq_lens", None)
    kwargs.pop("longest", None)
    return lengths if lengths is not None or ends is None else [n for n in ends.diff().tolist() if n]


def _to_rows(body: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    notes = getattr(body, NAME)
    lengths = _lengths(kwargs) or getattr(notes, "noted", None)
    notes.lengths, notes.noted = lengths, None
    if lengths is None:
        return args, kwargs
    kwargs.pop("position_ids", None)  # a row's own positions count from its start
    ids = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
    mask = torch.arange(max(lengths), device=ids.device) < torch.tensor(lengths, device=ids.device)[:, None]
    rows = pad_sequence(list(ids[0].split(lengths)), batch_first=True)
    return (), {**kwargs, "input_ids": rows, "attention_mask": mask.long()}


def _to_pack(body: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    lengths = getattr(getattr(body, NAME), "lengths", None)
    if lengths is None:
        return output
    rows = output.last_hidden_state
    output.last_hidden_state = torch.cat([row[:length] for row, length in zip(rows, lengths, strict=True)])[None]
    return output


def whole_texts(model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    """The logits (length, V) of whole texts, in one padded batch without a cache."""
    if encodes(model):
        return _whole_answers(model, texts)
    device = next(model.parameters()).device
    rows = pad_sequence([torch.tensor(text, device=device) for text in texts], batch_first=True)
    mask = torch.arange(rows.shape[1], device=device) < torch.tensor([len(text) for text in texts], device=device)[:, None]
    logits = model(input_ids=rows, attention_mask=mask.long(), use_cache=False).logits
    return [row[: len(text)] for row, text in zip(logits, texts, strict=True)]


# Encoder–decoders -----------------------------------------------------------------------------------------------------
#
# A text is a prompt, the end of a text, the token that answers begin with, and an answer (`worker/conversion/trial.py:question_and_answer`
# writes it so). The encoder reads the prompt with its end, the decoder all that follows; the states of the prompt's own tokens are zero,
# since none of them predicts anything.

_ENCODER, _EDGE = "luthier_encoder", "luthier_edge"


class Edge(NamedTuple):
    """The ids of the end of a text and of the token that answers begin with."""

    end: int
    first: int


def encodes(model: torch.nn.Module) -> bool:
    """Whether it is an encoder–decoder."""
    return bool(getattr(transformer(model).config, "is_encoder_decoder", False))


def edge_of(model: torch.nn.Module) -> Edge:
    config = transformer(model).config
    end = config.eos_token_id
    return Edge(end[0] if isinstance(end, list) else end, config.decoder_start_token_id)


def answer_start(ids: Sequence[int], edge: Edge) -> int:
    """Where the decoder's part of a text begins; its length where it has none."""
    return next((i for i in range(1, len(ids)) if ids[i] == edge.first and ids[i - 1] == edge.end), len(ids))


def _sides(texts: Sequence[Sequence[int]], edge: Edge, device: torch.device) -> tuple[list[int], dict[str, torch.Tensor]]:
    """Where each text's answer begins, and both sides as padded batches with their masks."""
    starts = [answer_start(text, edge) for text in texts]
    prompts = [list(text[:start]) or [edge.end] for text, start in zip(texts, starts, strict=True)]
    answers = [list(text[start:]) or [edge.first] for text, start in zip(texts, starts, strict=True)]
    found = {}
    for name, rows in (("encoder", prompts), ("decoder", answers)):
        found[name] = pad_sequence([torch.tensor(row, device=device) for row in rows], batch_first=True)
        lengths = torch.tensor([len(row) for row in rows], device=device)
        found[f"{name}_mask"] = (torch.arange(found[name].shape[1], device=device) < lengths[:, None]).long()
    return starts, found


def _behind(rows: torch.Tensor, starts: Sequence[int], lengths: Sequence[int]) -> list[torch.Tensor]:
    """Each text's (length, N): zeros for its prompt, and its part of the decoder's rows (B, T, N)."""
    return [
        torch.cat([row.new_zeros(start, row.shape[-1]), row[: length - start]])
        for row, start, length in zip(rows, starts, lengths, strict=True)
    ]


def _to_two_sides(body: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    notes, lengths = getattr(body, NAME), _lengths(kwargs)
    notes.lengths = lengths
    if lengths is None:
        return args, kwargs
    kwargs.pop("position_ids", None)
    ids = kwargs.pop("input_ids") if "input_ids" in kwargs else args[0]
    notes.noted, sides = _sides([part.tolist() for part in ids[0].split(lengths)], getattr(body, _EDGE), ids.device)
    states = getattr(body, _ENCODER)(input_ids=sides["encoder"], attention_mask=sides["encoder_mask"]).last_hidden_state
    given = {"input_ids": sides["decoder"], "attention_mask": sides["decoder_mask"]}
    return (), {**kwargs, **given, "encoder_hidden_states": states, "encoder_attention_mask": sides["encoder_mask"]}


def _to_answers(body: torch.nn.Module, args: tuple[Any, ...], output: Any) -> Any:
    notes = getattr(body, NAME)
    lengths = getattr(notes, "lengths", None)
    if lengths is None:
        return output
    output.last_hidden_state = torch.cat(_behind(output.last_hidden_state, notes.noted, lengths))[None]
    return output


def _whole_answers(model: torch.nn.Module, texts: Sequence[Sequence[int]]) -> list[torch.Tensor]:
    starts, sides = _sides(texts, edge_of(model), next(model.parameters()).device)
    given = {"input_ids": sides["encoder"], "attention_mask": sides["encoder_mask"]}
    given |= {"decoder_input_ids": sides["decoder"], "decoder_attention_mask": sides["decoder_mask"]}
    return _behind(model(**given, use_cache=False).logits, starts, [len(text) for text in texts])


# Answers --------------------------------------------------------------------------------------------------------------


def is_padded(model: torch.nn.Module) -> bool:
    """Whether packs are read as padded batches by this model."""
    return hasattr(decoder(model), NAME)


@torch.no_grad()
def written(
    model: torch.nn.Module,
    prompts: Sequence[Sequence[int]],
    most: int,
    stops: Container[int],
    choose: Callable[[torch.Tensor], torch.Tensor],
    seconds: float | None,
) -> list[list[int]]:
    """Answers of at most `most` tokens, with their stop token; `choose` takes a token from logits (V,). Every token reads the whole text
    again, since nothing is known of such a model's cache. After `seconds` all end where they are."""
    until = time.monotonic() + seconds if seconds is not None else float("inf")
    texts, over = [list(prompt) for prompt in prompts], [False] * len(prompts)
    for _ in range(most):
        going = [i for i, ended in enumerate(over) if not ended]
        if not going or time.monotonic() > until:
            break
        for i, logits in zip(going, whole_texts(model, [texts[i] for i in going]), strict=True):
            texts[i].append(int(choose(logits[-1])))
            over[i] = texts[i][-1] in stops
    return [text[len(prompt) :] for text, prompt in zip(texts, prompts, strict=True)]
