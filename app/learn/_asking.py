"""Prompts that a stop sends to a model and waits for; each is kept as an exchange of the playground."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from sqlalchemy.orm import Session

from app.inference import playground
from app.inference.answer_fold import AnswerFold
from app.inference.playground import PendingAnswer
from app.inference.protocol import Entry, Sampling
from app.kit.json_safe import storable
from app.languages import ngettext
from app.learn._base import StartedStop, StopBar, StopBars, StopText
from app.tables import Exchange, StopVisit, User

TOKENS = 64


def ask(session: Session, user: User, model: str, prompt: str, *, tokens: int = TOKENS) -> tuple[Exchange, PendingAnswer]:
    """The likeliest answer of a model to one prompt, as the playground asks for it."""
    exchange, asked = playground.ask(session, user, [model], prompt, Sampling(max_tokens=tokens, temperature=0, seed=0))
    return exchange, asked[0]


def ask_raw(session: Session, user: User, model: str, prompt: str, *, tokens: int = TOKENS, **turns: Any) -> tuple[Exchange, PendingAnswer]:
    """The same with the request written out: `messages=`, or without any the text itself, which the model continues."""
    who = playground.speaker(session, user, model)
    sampling = Sampling(max_tokens=tokens, temperature=0, seed=0)
    request = playground.request_for(user, who, sampling, **(turns or {"prompt": playground.readable(prompt)}))
    exchange = Exchange(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, source="playground", prompt=storable(prompt),
        sampling=storable(sampling.model_dump(mode="json") | {"models": [model], "follows": {}}),
    )  # fmt: skip
    session.add(exchange)
    session.flush()
    return exchange, PendingAnswer(who, request)


def record(session: Session, begun: StartedStop, entries: Mapping[str, Sequence[Entry]]) -> None:
    """Keep every answer with its exchange; `begun.refs["exchanges"]` has the id of each by its key."""
    for key, heard in entries.items():
        playground.record(session, uuid.UUID(begun.refs["exchanges"][key]), begun.asked[key], AnswerFold.of(heard))


def answers(session: Session, user: User, visit: StopVisit, titles: Mapping[str, str]) -> dict[str, StopText]:
    """The answers of a visit by their keys, in the order of `titles`; those whose exchange was deleted are left out."""
    kept = visit.refs.get("exchanges") or {}  # JSONB keeps no order
    wanted = {key: uuid.UUID(kept[key]) for key in titles if key in kept}
    said = playground.answers(session, list(wanted.values()))
    found = {}
    for key, exchange in wanted.items():
        if said[exchange]:
            one = said[exchange][0]
            fault = (one.error or {}).get("message", "")
            note = f"{one.model_name}, {playground.proof(one)}"
            found[key] = StopText(titles[key], one.text or fault, one.rendered_prompt or "", None, f"/playground/{exchange}", note)
    return found


def token_bars(session: Session, visit: StopVisit, titles: Mapping[str, str], count: str, title: str) -> list[StopBars]:
    """Tokens of each prompt (`prompt_tokens`) or answer (`completion_tokens`) as bars."""
    keys = {uuid.UUID(found): key for key, found in (visit.refs.get("exchanges") or {}).items() if key in titles}
    said = {keys[exchange]: rows[0].usage or {} for exchange, rows in playground.answers(session, list(keys)).items() if rows}
    counts = {key: int(said[key].get(count) or 0) for key in titles if key in said}
    most = max(counts.values(), default=0)
    bars = (
        [StopBar(titles[key], number / most, ngettext("%(num)s token", "%(num)s tokens", number)) for key, number in counts.items()]
        if most
        else []
    )
    return [StopBars(title, bars)] if bars else []


def fault_of(session: Session, visit: StopVisit) -> str:
    """Why the first answer that failed did so; empty where none did."""
    said = playground.answers(session, [uuid.UUID(key) for key in (visit.refs.get("exchanges") or {}).values()])
    broken = next((one.error for rows in said.values() for one in rows if one.error), None)
    return f"{broken['message']} {broken.get('hint') or ''}".strip() if broken else ""
