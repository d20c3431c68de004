"""Blind votes: two models answer one prompt, their sides shuffled and their names hidden, and a person chooses the better answer.

Votes become a preference dataset, and answers that a person has rewritten a dataset of conversations.
"""

from __future__ import annotations

import json
import secrets
import uuid
from collections.abc import Sequence
from typing import Any, NamedTuple

from sqlalchemy import Select, func, select
from sqlalchemy.orm import Session

from app import formats, limits, ownership
from app.datasets import service as datasets
from app.datasets.row_store import row_at
from app.errors import BadField, Conflict, NotFound
from app.inference import playground
from app.inference.answer_fold import AnswerFold
from app.inference.playground import PendingAnswer
from app.inference.protocol import Sampling
from app.kit import ids, stats
from app.kit.json_safe import storable
from app.languages import gettext, localized, ngettext
from app.ownership import owned
from app.storage import files, places
from app.tables import JSON, Answer, Dataset, Exchange, User, Vote

MAX_EDIT_LENGTH = 100_000  # characters
FEWEST = 6
"""Minimum decided votes for a verdict: five fall to one side by chance once in sixteen times."""


def draw(dataset: Dataset) -> list[JSON]:
    """A conversation that needs an answer, from a random row. Raises Conflict while the dataset is not ready, and BadField for
    texts without questions."""
    if dataset.status != "ready" or not dataset.rows_path or not dataset.good_rows:
        raise Conflict(
            gettext("%(dataset)s has no rows that can be read.", dataset=dataset.name),
            hint=gettext("Wait until it is read, or choose another."),
            param="dataset",
        )
    for _ in range(20):
        place = secrets.randbelow(dataset.good_rows)
        messages = _asks(json.loads(row_at(places.path(dataset.rows_path), place, dataset.name)))
        if messages and str(messages[-1].get("content") or "").strip():
            return messages
    raise BadField(
        gettext("The rows of %(dataset)s ask nothing.", dataset=dataset.name),
        hint=gettext("Take a dataset of conversations, instructions or labels."),
        param="dataset",
    )


def _asks(row: JSON) -> list[JSON]:
    """The messages before the answer of a normalized row."""
    messages = formats.of(row).before_answer(row)
    plain = [{"role": m["role"], "content": m.get("content") or ""} for m in messages]
    return plain if plain and plain[-1]["role"] == "user" else []


def begin(
    session: Session, user: User, names: Sequence[str], messages: list[JSON], sampling: Sampling, dataset: Dataset | None = None
) -> tuple[Vote, list[PendingAnswer]]:
    """A round whose answers are still to come. Which model is left is drawn here, and hidden until the vote.

    Raises BadField for anything but two different models, and for an empty prompt.
    """
    if len(names) != 2 or names[0] == names[1]:
        raise BadField(gettext("A blind vote needs two different models."), hint=gettext("Choose two."), param="models")
    question = str(messages[-1].get("content", "")) if messages else ""
    if not question.strip():
        raise BadField(gettext("The prompt is empty."), hint=gettext("Write something for the models to answer."), param="prompt")
    sides = list(names) if secrets.randbelow(2) else list(reversed(names))
    if sampling.seed is None:
        sampling = sampling.model_copy(update={"seed": secrets.randbelow(2**31)})
    limits.check(session, user, "tokens_per_day")
    asked = []
    for name in sides:
        who = playground.speaker(session, user, name)
        given: dict[str, Any] = {"prompt": question} if who.ref.kind == "generic" else {"messages": messages}
        asked.append(PendingAnswer(who, playground.request_for(user, who, sampling, **given)))
    vote = Vote(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, messages=storable(messages), dataset_id=dataset.id if dataset else None,
        left_model=asked[0].speaker.name, right_model=asked[1].speaker.name,
    )  # fmt: skip
    session.add(vote)
    session.flush()
    return vote, asked


def answered(
    session: Session, user: User, vote_id: uuid.UUID, asked: Sequence[PendingAnswer], heard: Sequence[AnswerFold], sampling: Sampling
) -> Vote:
    """Store both answers, with the proof of which weights gave them. Raises Conflict, and deletes the round, when one of them failed."""
    vote = get(session, user, vote_id)
    broken = next((h.error for h in heard if h.error), None)
    if broken:
        forget(session, user, vote_id)
        return vote
    exchange = playground.record_call(
        session, user, list(zip(asked, heard, strict=True)), sampling,
        source="vote", messages=vote.messages, prompt=vote.messages[-1]["content"],
    )  # fmt: skip
    vote.exchange_id = exchange.id
    vote.left_text, vote.right_text = (storable(h.choices[0].text if h.choices else "") for h in heard)
    session.flush()
    return vote


def forget(session: Session, user: User, vote_id: uuid.UUID) -> None:
    """Delete a round that cannot be voted on: an answer failed, or nobody waited for it."""
    session.delete(get(session, user, vote_id))
    session.flush()


def add(
    session: Session, user: User, names: Sequence[str], messages: list[JSON], texts: Sequence[str], choice: int, edited: str | None
) -> Vote:
    """A vote that was cast elsewhere, as `POST /v1/votes` sends it."""
    if len(names) != 2 or len(texts) != 2 or names[0] == names[1]:
        raise BadField(gettext("A vote names two different models and an answer of each."), param="models")
    vote = Vote(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, messages=storable(messages), left_model=names[0], right_model=names[1],
        left_text=storable(texts[0]), right_text=storable(texts[1]),
    )  # fmt: skip
    session.add(vote)
    session.flush()
    return cast(session, vote, choice, edited)


def cast(session: Session, vote: Vote, choice: int, edited: str | None = None) -> Vote:
    """1 is the left answer, 2 the right one, 0 neither. Raises Conflict for a second vote: by then the names are known."""
    session.refresh(vote, with_for_update=True)
    if choice not in (0, 1, 2):
        raise BadField(gettext("A vote is 1, 2 or 0 for a tie."), param="choice")
    if vote.choice is not None:
        raise Conflict(gettext("This round was voted on already."), hint=gettext("Ask for the next one."))
    if edited and len(edited) > MAX_EDIT_LENGTH:
        raise BadField(
            gettext("The edited answer has %(count)s characters; %(most)s is the most.", count=len(edited), most=MAX_EDIT_LENGTH),
            param="edited",
        )
    vote.choice, vote.edited = choice, storable(edited) if edited and edited.strip() else None
    vote.voted_at = func.clock_timestamp()
    session.flush()
    session.refresh(vote)
    return vote


def prefer(session: Session, user: User, answer_id: uuid.UUID) -> tuple[Exchange, int]:
    """A vote for one answer of the playground over each other answer to the same prompt; returns how many. Raises Conflict where
    there is none."""
    chosen = session.get(Answer, answer_id)
    if chosen is None:
        raise NotFound(
            gettext("No such answer."), hint=gettext("Reload the playground: an answer is stored when it has ended."), param="answer"
        )
    exchange = playground.get(session, user, chosen.exchange_id)
    thread = playground.thread(session, user, exchange.id)
    others = [a for a in thread[-1][1] if a.id != chosen.id and not a.error and a.model_name != chosen.model_name]
    if chosen.error or not others:
        raise Conflict(gettext("There is no other answer to prefer this one over."), hint=gettext("Ask two models the same."))
    messages = list(exchange.messages or [])
    for earlier, answer in playground.column(thread, chosen.model_name)[:-1]:
        messages += [{"role": "user", "content": earlier.prompt}, {"role": "assistant", "content": answer.text}]
    messages.append({"role": "user", "content": exchange.prompt})
    for other in others:
        add(session, user, [chosen.model_name, other.model_name], messages, [chosen.text, other.text], 1, None)
    return exchange, len(others)


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User) -> Select[Vote]:
    return ownership.mine(Vote, user, Vote.choice.is_not(None))


def get(session: Session, user: User, vote_id: uuid.UUID) -> Vote:
    return owned(session, Vote, user, vote_id)


class Score(NamedTuple):
    """One pair of models: how often the first won, the second won, and neither. Shares and tests are over the decided votes; a
    tie says nothing about which is better."""

    first: str
    second: str
    won: int
    lost: int
    tied: int

    @property
    def votes(self) -> int:
        return self.won + self.lost + self.tied

    @property
    def decided(self) -> int:
        return self.won + self.lost

    @property
    def rate(self) -> float | None:
        """The first model's share of the decided votes."""
        return self.won / self.decided if self.decided else None

    @property
    def interval(self) -> tuple[float, float]:
        return stats.clopper_pearson(self.won, self.decided)

    @property
    def p(self) -> float:
        return stats.sign_test(self.won, self.lost)

    @property
    def says(self) -> str:
        if self.decided < FEWEST:
            missing = FEWEST - self.decided
            return ngettext(
                "Too few to tell: %(num)s more vote for a side, at least.",
                "Too few to tell: %(num)s more votes for a side, at least.",
                missing,
            )
        if self.p >= stats.SURE:
            return gettext(
                "Too close to tell: chance alone brings such a result in %(share)s of cases. More votes would tell.",
                share=localized(f"{self.p:.0%}"),
            )
        better = self.first if self.won > self.lost else self.second
        return gettext(
            "%(model)s is preferred by more than chance explains (exact sign test, p = %(p)s).",
            model=better,
            p=localized(f"{max(self.p, 1e-4):.2g}"),
        )


def scores(session: Session, user: User) -> list[Score]:
    """Every pair that was voted on, most votes first."""
    found: dict[tuple[str, str], list[int]] = {}
    for left, right, choice in session.execute(
        select(Vote.left_model, Vote.right_model, Vote.choice).where(Vote.project_id == user.project_id, Vote.choice.is_not(None))
    ):
        pair = (left, right) if left <= right else (right, left)
        counts = found.setdefault(pair, [0, 0, 0])
        winner = left if choice == 1 else right if choice == 2 else None
        counts[2 if winner is None else 0 if winner == pair[0] else 1] += 1
    return sorted((Score(*pair, *counts) for pair, counts in found.items()), key=lambda s: -s.votes)


def to_json(vote: Vote) -> JSON:
    """The models of the sides are included only once the vote is in."""
    names = ("left_model", "right_model") if vote.choice is not None else ()
    return {
        "id": ids.public(ids.VOTE, vote.id), "object": "vote", "messages": vote.messages, "left": vote.left_text, "right": vote.right_text,
        "choice": vote.choice, "edited": vote.edited, **{name: getattr(vote, name) for name in names},
        "created_at": int(vote.created_at.timestamp()),
    }  # fmt: skip


# Datasets -----------------------------------------------------------------------------------------------------------


def make_dataset(session: Session, user: User, kind: str) -> Dataset:
    """`preference`: each vote that was no tie, with an edited answer preferred to both. `chat`: the edited answers, and where
    there is none the answer that won. Raises Conflict when there is nothing to train on."""
    rows = list(session.scalars(mine(user).order_by(Vote.created_at, Vote.id)))
    lines = [line for vote in rows for line in (_pairs(vote) if kind == "preference" else _turns(vote))]
    if kind not in ("preference", "chat"):
        raise BadField(gettext("Votes become a preference or a chat dataset."), param="kind")
    if not lines:
        raise Conflict(
            gettext("No vote prefers one answer yet, so there is nothing to train on."),
            hint=gettext("Vote for one side, or edit an answer."),
        )
    data = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines).encode()
    file = files.add_bytes(session, user, data, f"votes-{kind}.jsonl", "fine-tune")
    return datasets.create(session, user, file, name=f"{'Preferences' if kind == 'preference' else 'Best answers'} from votes", format=kind)


def _pairs(vote: Vote) -> list[JSON]:
    texts = {1: vote.left_text, 2: vote.right_text}
    pairs = []
    if vote.edited:
        best = texts.get(vote.choice or 0, vote.left_text)
        pairs.append((vote.edited, best))
    if vote.choice in (1, 2):
        pairs.append((texts[vote.choice], texts[3 - vote.choice]))
    return [
        {"prompt": vote.messages, "chosen": [_says(good)], "rejected": [_says(bad)]}
        for good, bad in pairs
        if good.strip() and bad.strip() and good.strip() != bad.strip()
    ]


def _turns(vote: Vote) -> list[JSON]:
    best = vote.edited or {1: vote.left_text, 2: vote.right_text}.get(vote.choice or 0)
    return [{"messages": [*vote.messages, _says(best)]}] if best and best.strip() else []


def _says(text: str) -> JSON:
    return {"role": "assistant", "content": text}
