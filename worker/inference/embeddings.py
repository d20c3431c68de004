"""Text embeddings by an encoder: the mean of its last hidden states over the text's tokens, normalized to length 1 (mean pooling,
Reimers and Gurevych 2019, Sentence-BERT, https://arxiv.org/abs/1908.10084, section 3)."""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModel, AutoTokenizer

from app.errors import BadRequest
from app.inference.protocol import Embedded
from app.models.integrity import BadModel, check
from app.spec import ModelRef
from worker.inference.model_cache import ModelCache
from worker.modeling.loading import LOADING, folder_of
from worker.runtime import devices

MAX_LOADED = 2
TOKENS_AT_ONCE = 8192
"""Padded tokens of one batch. Texts are sorted by length, so little of a batch is padding."""

_kept: ModelCache[tuple[Any, Any]] = ModelCache(MAX_LOADED, lambda pair: pair[1])  # tokenizer and model


@torch.inference_mode()
def embed(ref: ModelRef, texts: list[str]) -> Embedded:
    """A unit vector for each text, in order. Raises BadRequest for an empty text or one longer than the model's context."""
    tokenizer, model = _kept.get((ref.path, ref.revision), lambda: _load(ref))
    most = min(ref.shape.positions, getattr(model.config, "max_position_embeddings", ref.shape.positions))
    ids = [tokenizer(text, verbose=False)["input_ids"] for text in texts]
    for place, (text, one) in enumerate(zip(texts, ids, strict=True)):
        if not text or not one:
            raise BadRequest(f"Text {place} is empty.", hint="Remove it.", param="input")
        if len(one) > most:
            raise BadRequest(
                f"Text {place} has {len(one)} tokens, and {ref.name} reads at most {most}.",
                hint="Cut it into parts.", param="input", code="context_length_exceeded",
            )  # fmt: skip
    vectors: list[list[float]] = [[] for _ in texts]
    for group in _groups([len(one) for one in ids]):
        batch = tokenizer.pad({"input_ids": [ids[i] for i in group]}, return_tensors="pt").to(model.device)
        hidden = model(**batch).last_hidden_state.float()
        mask = batch["attention_mask"].unsqueeze(-1).float()
        pooled = torch.nn.functional.normalize((hidden * mask).sum(1) / mask.sum(1), dim=-1)
        for i, vector in zip(group, pooled.tolist(), strict=True):
            vectors[i] = vector
    return Embedded(vectors=vectors, tokens=sum(map(len, ids)))


def _groups(lengths: list[int]) -> list[list[int]]:
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)
    groups: list[list[int]] = []
    for i in order:
        if groups and (len(groups[-1]) + 1) * lengths[groups[-1][0]] <= TOKENS_AT_ONCE:
            groups[-1].append(i)
        else:
            groups.append([i])
    return groups


def _load(ref: ModelRef) -> tuple[Any, Any]:
    check(ref.path, ref.name, ref.revision, may_be_plain=True)
    device = devices.best().kind
    folder = folder_of(ref.path)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
        with LOADING:
            model = AutoModel.from_pretrained(
                folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BadModel(f"{ref.name} cannot be loaded: {error}", hint="Add the model again, or choose another.") from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    return tokenizer, model.to(device).eval()
