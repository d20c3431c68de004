"""The playground: the same prompt sent to several models, and a record of each answer and the weights that gave it.

A conversation is a chain of exchanges. Each pane has a history of its own, since each model sees its own answers; the history is
rebuilt here from the database, so a reload, a link and a plain form continue where the script would. A column may continue with
another model: the exchange then says which column of the turn before it `follows`.
"""

from __future__ import annotations

import hashlib
import secrets
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from sqlalchemy import exists, or_, select
from sqlalchemy.orm import Session, aliased

from app import limits
from app.errors import BadField
from app.inference import external_servers, external_tools, llama_cpp, tryout
from app.inference.answer_fold import AnswerFold, Choice
from app.inference.protocol import ExternalEngine, GenerateRequest, Sampling
from app.jobs import solved_examples
from app.kit.json_safe import storable
from app.languages import gettext, localized, mark
from app.models import aliases, asked_models, interpolation
from app.models import service as models
from app.models.service import Resolved
from app.ownership import owned
from app.spec import SILENT, ModelRef
from app.tables import Answer, Checkpoint, Exchange, Job, Model, User

MAX_PANES = 4
MAX_TURNS = 200
MAX_PROMPT_LENGTH = 1_000_000  # characters


class ResolvedModel(NamedTuple):
    """A model to be prompted: the name in the request, what it resolves to, and the external engine that answers, if any."""

    name: str
    resolved: Resolved
    engine: ExternalEngine | None = None
    examples: tuple[solved_examples.SolvedExample, ...] = ()

    @property
    def ref(self) -> ModelRef:
        return self.resolved.ref

    @property
    def adapter_sha256(self) -> str | None:
        return self.ref.adapters[-1].sha256 if self.ref.adapters else None


class PendingAnswer(NamedTuple):
    """One model's part of an exchange, ready to be sent. The row of its answer gets the request's id."""

    speaker: ResolvedModel
    request: GenerateRequest


# Asking -------------------------------------------------------------------------------------------------------------


def speaker(session: Session, user: User, name: str) -> ResolvedModel:
    """The model of a name. Raises NotFound, Conflict or BadData, as `models.resolve` does, and BadField for one that is not generative."""
    resolved = asked_models.writer(session, user, name)
    return ResolvedModel(name, resolved, external_servers.engine_of(session, resolved))


def column_speaker(session: Session, user: User, name: str) -> ResolvedModel:
    """The same for a column of the page, which may be a base with the few-shot examples of a fine-tuned model's verdict."""
    if not name.startswith(tryout.FEW_SHOT):
        return speaker(session, user, name)
    look = tryout.of_name(session, user, name)
    if look is None or not look.examples:
        raise BadField(
            gettext("%(name)s has no solved examples.", name=name),
            hint=gettext("Choose a model fine-tuned on questions with answers."),
            param="models",
        )
    return speaker(session, user, look.base.name)._replace(name=name, examples=tuple(look.examples))


def request_for(user: User, who: ResolvedModel, sampling: Sampling, **prompt: Any) -> GenerateRequest:
    """One request. `prompt` is one of `messages=`, `prompt=` and `tokens=`, with messages also `tools=` and what else a GenerateRequest has.
    A seed is drawn when none was given. Raises BadField for tools that the model's external engine cannot honor."""
    seed = sampling.seed if sampling.seed is not None else secrets.randbelow(2**31)
    engine = None if "look" in prompt else who.engine  # log-probabilities of a prompt need the local weights
    if engine is not None and engine.local and not llama_cpp.answers(sampling, prompt.get("tools")):
        engine = None
    request = GenerateRequest(id=uuid.uuid4(), owner=user.id, model=who.ref, engine=engine, sampling=sampling, seed=seed, **prompt)
    external_tools.check(request)
    return request


def ask(
    session: Session,
    user: User,
    names: Sequence[str],
    prompt: str,
    sampling: Sampling,
    *,
    system: str = "",
    parent: uuid.UUID | None = None,
    follows: Mapping[str, str] | None = None,
) -> tuple[Exchange, list[PendingAnswer]]:
    """A new exchange and, for each model, the request that continues its column: its own, or the one it `follows`. All panes
    share one seed."""
    if not 1 <= len(names) <= MAX_PANES:
        raise BadField(
            gettext("Choose between one and %(most)s models; %(count)s were named.", most=MAX_PANES, count=len(names)), param="models"
        )
    if len(set(names)) != len(names):
        raise BadField(gettext("A model was named twice."), hint=gettext("Choose different models."), param="models")
    if not prompt:
        raise BadField(gettext("The prompt is empty."), hint=gettext("Write something for the models to answer."), param="prompt")
    if len(prompt) > MAX_PROMPT_LENGTH:
        raise BadField(
            gettext("The prompt has %(count)s characters; %(most)s is the most.", count=len(prompt), most=MAX_PROMPT_LENGTH),
            hint=gettext("Shorten it."),
            param="prompt",
        )
    limits.check(session, user, "tokens_per_day")
    prompt, system = readable(prompt), readable(system)
    taken_over = {name: old for name, old in (follows or {}).items() if name in names and old != name}
    before = thread(session, user, parent) if parent else []
    if sampling.seed is None:
        sampling = sampling.model_copy(update={"seed": secrets.randbelow(2**31)})
    exchange = Exchange(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        parent_id=parent,
        source="playground",
        prompt=storable(prompt),
        messages=storable([{"role": "system", "content": system}]) if system else None,
        sampling=storable(sampling.model_dump(mode="json") | {"models": list(names), "follows": taken_over}),
    )
    asked = []
    for name in names:
        who = column_speaker(session, user, name)
        turns = column(before, taken_over.get(name, name))
        asked.append(PendingAnswer(who, request_for(user, who, sampling, **_input(who, turns, prompt, system))))
    session.add(exchange)
    session.flush()
    return exchange, asked


def _input(who: ResolvedModel, before: Sequence[tuple[Exchange, Answer]], prompt: str, system: str) -> dict[str, Any]:
    """The prompt as the model's kind takes it: a generic one continues the text, an instruction model gets this turn alone, a
    dialogue model all turns. A turn whose answer failed is skipped: there is nothing to continue from."""
    turns = [(exchange.prompt or "", answer.text) for exchange, answer in before if not answer.error]
    if who.ref.kind == "generic" and not any(isinstance(e.prompt, list) for e in who.examples):
        text = "".join(question + answer for question, answer in turns) + prompt
        return {"prompt": solved_examples.with_examples(text, who.examples)}
    messages: list[dict[str, Any]] = [{"role": "system", "content": system}] if system else []
    if who.ref.kind != "instruction":
        for question, answer in turns:
            messages += [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    told = solved_examples.with_examples([*messages, {"role": "user", "content": prompt}], who.examples)
    return {"messages": told, "split": who.ref.kind != "generic"}


def column(thread: Sequence[tuple[Exchange, Sequence[Answer]]], name: str) -> list[tuple[Exchange, Answer]]:
    """The history of the column that has this name at the end of a conversation, first turn first."""
    found: list[tuple[Exchange, Answer]] = []
    for exchange, said in reversed(thread):
        found = [(exchange, a) for a in said if a.model_name == name] + found
        name = (exchange.sampling.get("follows") or {}).get(name, name)
    return found


def fingerprint(who: ResolvedModel) -> str:
    """Changes when the weights change: the API's `system_fingerprint`."""
    parts = [who.ref.revision, *(a.key for a in who.ref.adapters)]
    return f"fp_{hashlib.sha256('|'.join(parts).encode()).hexdigest()[:12]}"


# Recording ----------------------------------------------------------------------------------------------------------


def record(session: Session, exchange_id: uuid.UUID, asked: PendingAnswer, heard: AnswerFold) -> list[Answer]:
    """Store what a model answered, one row for each choice; a truncated answer as far as it came."""
    who, request = asked.speaker, asked.request
    rows = []
    for index in range(request.sampling.n):
        choice = heard.choices.get(index, Choice())
        row = Answer(
            id=request.id if index == 0 else uuid.uuid4(),
            exchange_id=exchange_id,
            model_id=who.resolved.model.id,
            checkpoint_id=who.resolved.checkpoint.id if who.resolved.checkpoint else None,
            model_name=who.name,
            revision=who.ref.revision,
            adapter_sha256=who.adapter_sha256,
            seed=request.seed + index,
            rendered_prompt=storable(heard.started.rendered_prompt) if heard.started else None,
            text=storable(choice.text),
            reasoning=storable(choice.reasoning) or None,
            tool_calls=storable(choice.calls) or None,
            finish_reason="error" if heard.error else choice.finish_reason or "cancelled",
            error=heard.error,
            usage=heard.usage() | ({"engine": request.engine.host} if request.engine else {}),
            first_token_seconds=heard.done.first_token_seconds if heard.done else None,
            tokens_per_second=heard.done.tokens_per_second if heard.done else None,
        )
        session.add(row)
        rows.append(row)
    session.flush()
    exchange, told = session.get_one(Exchange, exchange_id), heard.usage()
    limits.count_tokens(session, exchange.owner_id, exchange.project_id, read=told["prompt_tokens"], written=told["completion_tokens"])
    return rows


def record_call(
    session: Session,
    user: User,
    heard: Sequence[tuple[PendingAnswer, AnswerFold]],
    sampling: Sampling,
    labels: Mapping[str, Any] | None = None,
    tools: Sequence[Any] | None = None,
    **asked: Any,
) -> Exchange:
    """Record a call of the API, with the labels and tools that it was given: its exchange and every answer. `asked` has the columns of the
    exchange that are the call's own; `stored` among them is what `app.inference.stored` finds again."""
    exchange = Exchange(
        owner_id=user.id,
        project_id=user.project_id,
        sampling=storable(
            sampling.model_dump(mode="json") | ({"labels": dict(labels)} if labels else {}) | ({"tools": list(tools)} if tools else {})
        ),
        **storable(asked),
    )
    session.add(exchange)
    session.flush()
    for one, said in heard:
        record(session, exchange.id, one, said)
    return exchange


def count_call(session: Session, user: User, heard: Sequence[AnswerFold]) -> None:
    """Count the tokens of a call that is not stored."""
    told = [said.usage() for said in heard]
    read, written = (sum(one[name] for one in told) for name in ("prompt_tokens", "completion_tokens"))
    limits.count_tokens(session, user.id, user.project_id, read=read, written=written)


def readable(text: str) -> str:
    """Text without lone surrogates, which JSON can contain and tokenizers refuse."""
    return text.encode("utf-8", "replace").decode()


# Looking back ---------------------------------------------------------------------------------------------------------


def get(session: Session, user: User, exchange_id: uuid.UUID) -> Exchange:
    return owned(session, Exchange, user, exchange_id)


def answers(session: Session, exchange_ids: Sequence[uuid.UUID]) -> dict[uuid.UUID, list[Answer]]:
    found: dict[uuid.UUID, list[Answer]] = {key: [] for key in exchange_ids}
    for row in session.scalars(select(Answer).where(Answer.exchange_id.in_(exchange_ids)).order_by(Answer.created_at, Answer.id)):
        found[row.exchange_id].append(row)
    return found


def thread(session: Session, user: User, exchange_id: uuid.UUID) -> list[tuple[Exchange, list[Answer]]]:
    """The conversation that ends with this exchange, first turn first."""
    chain: list[Exchange] = []
    key: uuid.UUID | None = exchange_id
    while key is not None and len(chain) < MAX_TURNS:
        chain.insert(0, get(session, user, key))
        key = chain[0].parent_id
    said = answers(session, [e.id for e in chain])
    return [(e, said[e.id]) for e in chain]


def history(session: Session, user: User, limit: int = 30) -> list[tuple[Exchange, list[Answer]]]:
    """Saved comparisons, then the newest exchanges of the playground; of a conversation its last turn, and the turns saved on the way."""
    later = aliased(Exchange)
    shown = or_(Exchange.title.is_not(None), ~exists().where(later.parent_id == Exchange.id))
    query = select(Exchange).where(Exchange.project_id == user.project_id, Exchange.source == "playground", shown)
    rows = session.scalars(query.order_by(Exchange.title.is_(None), Exchange.created_at.desc(), Exchange.id).limit(limit)).all()
    said = answers(session, [e.id for e in rows])
    return [(e, said[e.id]) for e in rows]


def proof(answer: Answer) -> str:
    engine = (answer.usage or {}).get("engine")
    return proof_line(answer.adapter_sha256, answer.revision, answer.tokens_per_second, answer.seed, engine)


def proof_line(
    adapter_sha256: str | None, revision: str | None, tokens_per_second: float | None, seed: int, engine: str | None = None
) -> str:
    """The line under an answer that says which weights gave it; for an external engine, which model was requested."""
    weights = (revision or "")[:6]
    if adapter_sha256:
        parts = [gettext("adapter %(adapter)s on revision %(revision)s", adapter=adapter_sha256[:6], revision=weights)]
    else:
        parts = [gettext("revision %(revision)s", revision=weights)]
    if tokens_per_second:
        parts.append(gettext("%(speed)s tokens/s", speed=localized(f"{tokens_per_second:.1f}")))
    parts.append(gettext("seed %(seed)s", seed=seed))
    if engine:
        parts.append(gettext("through %(engine)s", engine=engine))
    return " · ".join(parts)


# The page -----------------------------------------------------------------------------------------------------------


class Option(NamedTuple):
    """One model the page offers. `text` distinguishes it from the others; one that is not kept is offered only where it was named."""

    name: str
    title: str
    kind: str
    text: str = ""
    kept: bool = True


class Turn(NamedTuple):
    exchange: Exchange
    answer: Answer
    speaker: Option  # of this turn: a column may have continued with another model


class Pane(NamedTuple):
    """One column: a model, the column of the last turn it continues, and its history."""

    name: str
    title: str
    kind: str
    follows: str
    turns: list[Turn]
    blends: list[tuple[float, str]]  # (interpolation point, name); none where it cannot be blended


def choices(session: Session, user: User, *named: str) -> dict[str, list[Option]]:
    """The models on offer that can be prompted, by group, newest fine-tuned model first, and those named. Classifiers and encoders are
    not generative."""
    plain = [interpolation.split_name(name)[0] for name in named]
    rows = [m for m in models.offered(session, user, *plain) if m.status == "ready" and m.kind not in SILENT]
    kinds: dict[uuid.UUID | None, str] = {m.id: m.kind for m in rows}
    few_shot = [m for m in tryout.with_few_shot(session, rows) if m.base_id in kinds]
    found = {
        mark("Base models"): [option(m) for m in rows if m.base_id is None],
        mark("Fine-tuned models"): [option(m) for m in reversed(rows) if m.base_id is not None],
        mark("Base, few-shot"): [
            option(m, tryout.FEW_SHOT + m.name, gettext("Base of %(model)s, few-shot", model=m.title))._replace(kind=kinds[m.base_id])
            for m in few_shot
        ],
        mark("Blends"): [
            option(m, f"{m.name}@0.5", gettext("%(model)s at %(strength)s%% strength", model=m.title, strength=50))
            for m in reversed(rows)
            if _blends(m)
        ][:20],
        mark("Checkpoints"): _checkpoints(session, user),
        mark("Aliases"): alias_options(session, user, rows),
    }
    return {group: options for group, options in found.items() if options}


def option(model: Model, name: str = "", title: str = "") -> Option:
    """A model as an option, or something derived from it under a name and title of its own."""
    return Option(name or model.name, title or model.title, model.kind, models.option_text(model, title), model.kept)


def alias_options(session: Session, user: User, rows: Sequence[Model]) -> list[Option]:
    """The aliases of these models."""
    named = aliases.of_models(session, user)
    return [Option(name, name, m.kind, f"{name} · {m.title}") for m in rows for name in named.get(m.id, ())]


def _blends(model: Model) -> bool:
    return model.job_id is not None and interpolation.why_not(model.strategy, labels=bool(model.labels)) is None


def _checkpoints(session: Session, user: User, limit: int = 50) -> list[Option]:
    newest = select(Checkpoint.id).join(Job, Checkpoint.job_id == Job.id).join(Model, Model.id == Job.model_id)
    newest = newest.where(
        Job.project_id == user.project_id, Job.deleted_at.is_(None), Checkpoint.deleted_at.is_(None), Model.deleted_at.is_(None)
    )
    query = select(Checkpoint, Job, Model.kind).join(Job, Checkpoint.job_id == Job.id).join(Model, Model.id == Job.model_id)
    query = query.where(Checkpoint.id.in_(newest.order_by(Checkpoint.created_at.desc()).limit(limit)))
    rows = session.execute(query.order_by(Checkpoint.created_at.desc())).all()
    return [
        Option(
            models.checkpoint_name(session, job, row.step),
            title := gettext("%(job)s, step %(step)s", job=job.name, step=row.step),
            kind,
            title,
            job.comparison_id is None,
        )
        for row, job, kind in rows
        if kind not in SILENT
    ]


def pane(name: str, offered: dict[str, list[Option]], thread: Sequence[tuple[Exchange, Sequence[Answer]]], follows: str = "") -> Pane:
    """A column of the page, also for a model that was deleted."""
    found, plain = option_of(name, offered), interpolation.split_name(name)[0]
    turns = [Turn(e, a, option_of(a.model_name, offered)) for e, a in column(thread, follows or name)]
    able = any(o.name == interpolation.full_name(plain, 0.5) for o in offered.get("Blends", []))
    places = [(at, plain if at == 1 else interpolation.full_name(plain, at)) for at in interpolation.POINTS] if able else []
    return Pane(found.name, found.title, found.kind, follows or name, turns, places)


def option_of(name: str, offered: dict[str, list[Option]]) -> Option:
    plain, share = interpolation.split_name(name)
    found = next((o for group in offered.values() for o in group if o.name == plain), Option(name, name, ""))
    if share is None:
        return found
    strength = localized(f"{share * 100:g}")
    return Option(name, gettext("%(model)s at %(strength)s%% strength", model=found.title, strength=strength), found.kind)
