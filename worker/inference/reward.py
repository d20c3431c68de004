"""Rewards of answers by a reward model, for graders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from app.errors import BadData, BadRequest
from app.formats.preference import conversation_with
from app.inference.protocol import Rewarded
from app.models.integrity import BadModel
from app.spec import ModelRef
from worker.data.batching import Tokenised
from worker.data.chat_template import render_row
from worker.data.preference_pairs import with_lead
from worker.inference.classify import TOKENS_AT_ONCE, LoadedClassifier, loaded
from worker.runtime.progress import drained
from worker.scoring.held_out import reading
from worker.training.objectives.classification import pack_of


def reward(ref: ModelRef, conversations: Sequence[Sequence[dict[str, Any]]]) -> Rewarded:
    """The reward of the last message of each conversation.

    Raises BadModel for a model that gives none or whose files changed, BadRequest for a conversation that its template refuses or that is
    longer than its context: the end of the answer would not be read.
    """
    model = loaded(ref)
    if not model.classifier.reads:
        raise BadModel(f"{ref.name} is no reward model.", hint="Choose one that was fine-tuned on preference pairs.")
    data = _tokenised(model, ref, conversations)
    found = np.zeros(len(data))

    def read(pack: Sequence[int]) -> None:
        inputs, lengths = pack_of(data, pack, model.engine.device)
        with model.engine.autocast():
            rewards = model.classifier(**inputs, lengths=lengths)
        found[pack] = rewards.double().cpu().numpy()[:, 0]

    drained(reading(model.classifier, read, data.lengths, TOKENS_AT_ONCE, model.engine))
    return Rewarded(rewards=found.tolist(), tokens=data.tokens)


def _tokenised(model: LoadedClassifier, ref: ModelRef, conversations: Sequence[Sequence[dict[str, Any]]]) -> Tokenised:
    kind, lead = model.classifier.reads, [model.tokenizer.pad_token_id or 0] * model.classifier.skip
    pieces, most = [], ref.shape.positions - len(lead)
    for place, messages in enumerate(conversations):
        *asked, answer = messages
        try:
            row = render_row(model.tokenizer, conversation_with({"messages": asked, "chosen": [answer]}, "chosen", kind), kind, most)
        except BadData as error:
            raise BadRequest(error.message, hint=error.hint, param="input") from None
        if row.cut:
            raise BadRequest(
                f"Conversation {place} has more than {most} tokens, which are all that {ref.name} reads.",
                hint="Shorten it.", param="input", code="context_length_exceeded",
            )  # fmt: skip
        pieces.append(with_lead(row, lead))
    starts = np.cumsum([0, *(len(ids) for ids, _ in pieces)]).astype(np.int64)
    ids, trained = (np.concatenate([piece[side] for piece in pieces]) for side in (0, 1))
    return Tokenised(ids, trained, starts, list(range(len(pieces))), 0, [])
