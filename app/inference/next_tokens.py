"""Next-token view: several models' likeliest next tokens for one text, and the probability of each token of the text."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app.errors import BadField
from app.inference import playground
from app.inference.playground import MAX_PANES, PendingAnswer, ResolvedModel
from app.inference.protocol import MAX_NEXT, Entry, PromptLogprobs, Sampling, SeenToken, StreamError
from app.languages import gettext
from app.tables import User

MAX_TEXT_LENGTH = 20_000  # characters


def ask(session: Session, user: User, names: Sequence[str], text: str, top_k: int) -> list[PendingAnswer]:
    """One request for each model. Raises BadField for no or too many models, and for an empty or overlong text."""
    if not 1 <= len(names) <= MAX_PANES or len(set(names)) != len(names):
        raise BadField(
            gettext("Name between one and %(most)s different models; %(count)s were named.", most=MAX_PANES, count=len(names)),
            param="models",
        )
    if not text:
        raise BadField(gettext("The text is empty."), hint=gettext("Write at least one character."), param="prompt")
    if len(text) > MAX_TEXT_LENGTH:
        raise BadField(
            gettext("The text has %(count)s characters; %(most)s is the most.", count=len(text), most=MAX_TEXT_LENGTH),
            hint=gettext("Shorten it."),
            param="prompt",
        )
    if not 1 <= top_k <= MAX_NEXT:
        raise BadField(gettext("top_k lies between 1 and %(most)s.", most=MAX_NEXT), param="top_k")
    asked = []
    for name in names:
        who = playground.speaker(session, user, name)
        request = playground.request_for(
            user, who, Sampling(max_tokens=1, temperature=0, seed=0), prompt=playground.readable(text), look=top_k
        )
        asked.append(PendingAnswer(who, request))
    return asked


class ModelTokens(NamedTuple):
    """One model's result. `tokens` are those of the text, `following` the likeliest next ones."""

    speaker: ResolvedModel
    tokens: list[SeenToken]
    following: list[SeenToken]
    error: dict[str, Any] | None = None

    @property
    def bits(self) -> float | None:
        """Bits per token: the mean of −log2 p over all tokens but the first."""
        known = [t.logprob for t in self.tokens if t.logprob is not None]
        return -sum(known) / len(known) / math.log(2) if known else None


def view(asked: PendingAnswer, entries: Sequence[Entry]) -> ModelTokens:
    seen = next((e for e in entries if isinstance(e, PromptLogprobs)), None)
    broke = next((e for e in entries if isinstance(e, StreamError)), None)
    error = {"message": broke.message, "hint": broke.hint} if broke else None
    return ModelTokens(asked.speaker, seen.tokens if seen else [], seen.following if seen else [], error)


def to_json(found: ModelTokens, tokens: bool) -> dict[str, Any]:
    """The API's response; with `tokens` also each token of the text."""
    said: dict[str, Any] = {
        "model": found.speaker.name,
        "revision": found.speaker.ref.revision,
        "adapter_sha256": found.speaker.adapter_sha256,
        "tokens": [_token(t) for t in found.following],
    }
    return said | {"prompt_tokens": [_token(t) for t in found.tokens]} if tokens else said


def _token(t: SeenToken) -> dict[str, Any]:
    return {"token": t.token, "id": t.id, "bytes": t.bytes, "logprob": t.logprob, "probability": probability(t)}


def probability(t: SeenToken) -> float | None:
    return None if t.logprob is None else math.exp(t.logprob)


def shade(t: SeenToken) -> int:
    """0 (certain) to 5 (p below 0.001): the CSS class that colors a token."""
    p = probability(t)
    return 0 if p is None else next((i for i, low in enumerate((0.5, 0.2, 0.05, 0.01, 0.001)) if p >= low), 5)


def side_by_side(views: Sequence[ModelTokens]) -> list[list[SeenToken | None]]:
    """Tokens in rows, one column for each model: where all tokenize the text in the same way, a row is one token."""
    return [list(row) for row in zip_longest(*(v.tokens for v in views))]


def same_tokens(views: Sequence[ModelTokens]) -> bool:
    return len({tuple(t.id for t in v.tokens) for v in views}) == 1
