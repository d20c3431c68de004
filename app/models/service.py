"""Models: bases and the models fine-tuned from them. Resolves names to weights, and knows which models depend on others."""

from __future__ import annotations

import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from sqlalchemy import ColumnElement, func, or_, select
from sqlalchemy.orm import Session, selectinload

from app.db import on_commit
from app.errors import BadData, BadField, Conflict, NotFound
from app.events import Finished
from app.kit import ids, manifest
from app.languages import gettext, ngettext
from app.models import hub, interpolation
from app.models.dependants import dependants
from app.models.model_card import AppliedAdapter, Provenance, upstream
from app.models.vocabulary import has_new_tokens, shape_of_result
from app.ownership import either
from app.settings import get_settings
from app.shapes import Shape
from app.spec import Adapter, ModelRef
from app.storage import places
from app.strategies import STRATEGIES, Strategy
from app.tables import Checkpoint, CheckpointPermission, Job, Model, ModelAlias, User

ORGANIZATION = "luthier"
"""The part of a fine-tuned model's name where OpenAI has the organization."""

_CHECKPOINT = re.compile(r"(ft:.+:(?P<job>[0-9a-f]{12})):ckpt-step-(?P<step>\d{1,12})")


class Resolved(NamedTuple):
    """What a name resolves to: the model (or, for a checkpoint of an unfinished job, the model it is fine-tuned from), the
    checkpoint when one was named, and the reference a worker loads."""

    model: Model
    checkpoint: Checkpoint | None
    ref: ModelRef


# Finding ------------------------------------------------------------------------------------------------------------


def visible(user: User) -> ColumnElement[bool]:
    """The models this person may see: shared ones and those of the project."""
    return Model.deleted_at.is_(None) & or_(Model.project_id.is_(None), Model.project_id == user.project_id)


def get(session: Session, user: User, name: str) -> Model:
    """The model with this name, alias or public id. Raises NotFound, also for another person's model and a deleted one."""
    key, plain = ids.parse(ids.MODEL, name) if re.fullmatch(r"model-[0-9a-f]{32}", name) else None, name.replace("\0", "")
    found = select(Model).where(Model.id == key if key else Model.name == plain, visible(user))
    model = session.scalar(found.order_by(Model.project_id).limit(1))  # one of the project comes before a shared one, which is null
    if model is None and key is None:
        named = select(ModelAlias.model_id).where(ModelAlias.project_id == user.project_id, ModelAlias.name == plain).scalar_subquery()
        model = session.scalar(select(Model).where(Model.id == named, visible(user)))
    if model is None:
        raise NotFound(
            gettext("No such model: %(name)s.", name=repr(name[:120])),
            hint=gettext("GET /v1/models lists the models of this studio; the page Models can add others."),
            param="model",
        )
    return model


def list_(session: Session, user: User, *wanted: ColumnElement[bool]) -> list[Model]:
    """Every model this person may see, or those wanted, oldest base first, each base before the models fine-tuned from it."""
    query = select(Model).options(selectinload(Model.base)).where(visible(user), *wanted)
    rows = session.scalars(query.order_by(Model.created_at, Model.id)).all()
    children: dict[uuid.UUID | None, list[Model]] = {}
    here = {row.id for row in rows}
    for row in rows:
        children.setdefault(row.base_id if row.base_id in here else None, []).append(row)

    def walk(key: uuid.UUID | None) -> Iterator[Model]:
        for row in children.get(key, []):
            yield row
            yield from walk(row.id)

    return list(walk(None))


OFFERED = 80  # an older one is offered where a link names it


def offered(session: Session, user: User, *named: str | None) -> list[Model]:
    """What a form offers: every base, the newest of the fine-tuned models, and those named, by name or public id."""
    names = [name.replace("\0", "") for name in named if name]
    keys = [ids.parse(ids.MODEL, name) for name in names if re.fullmatch(r"model-[0-9a-f]{32}", name)]
    seen = select(Model.id).where(visible(user))
    tuned = seen.where(Model.base_id.is_not(None), Model.kept).order_by(Model.created_at.desc()).limit(OFFERED)
    found = either(
        seen.where(Model.base_id.is_(None)), tuned.where(Model.project_id == user.project_id), tuned.where(Model.project_id.is_(None)),
        seen.where(Model.name.in_(names)), seen.where(Model.id.in_(keys)),
    )  # fmt: skip
    return list_(session, user, Model.id.in_(found))


def resolve(session: Session, user: User, name: str, *, allowed: bool = False) -> Resolved:
    """Resolve `model=`: names, aliases, public ids, `ft:…` names, `ft:…:ckpt-step-N` and `ftckpt_…`, each with an optional blend,
    as in `NAME@0.5`. With `allowed` also those of another project that allows this one to use them, as OpenAI's checkpoint permissions do.

    Raises NotFound for an unknown name, Conflict while the model is still being fetched, BadData when a checkpoint's folder no
    longer verifies, and BadField for an impossible blend.
    """
    plain, share = interpolation.split_name(name)
    found = _resolve(session, user, plain, allowed)
    return found if share is None else found._replace(ref=_blended(session, found, share))


def _blended(session: Session, found: Resolved, share: float) -> ModelRef:
    """The reference of a model interpolated between its base and itself."""
    key = found.checkpoint.job_id if found.checkpoint else found.model.job_id
    job = session.get(Job, key) if key else None
    strategy = job.spec["strategy"]["name"] if job else None
    if reason := interpolation.why_not(strategy, labels=bool(found.ref.labels)):
        raise BadField(
            gettext("%(model)s cannot be blended with its base: %(reason)s", model=found.ref.name, reason=reason),
            hint=gettext("Leave the @ and what follows away."),
            param="model",
        )
    assert job is not None and strategy is not None, "what was tuned here has a job"
    return interpolation.blended(found.ref, reference(session, session.get_one(Model, job.model_id)), strategy, share)


def _resolve(session: Session, user: User, name: str, allowed: bool) -> Resolved:
    if name.startswith("ftckpt_") or _CHECKPOINT.fullmatch(name):
        return _resolve_checkpoint(session, user, name, allowed)
    model = (_allowed_model(session, user, name.replace("\0", "")) if allowed else None) or get(session, user, name)
    return Resolved(model, None, reference(session, model))


def _permission(user: User, name: str) -> ColumnElement[bool]:
    """That the project of a job allows this person's project to use the job's model or checkpoint of this name."""
    mine = CheckpointPermission.project_id == ids.public(ids.PROJECT, user.project_id)
    return (
        select(CheckpointPermission.id).where(CheckpointPermission.job_id == Job.id, mine, CheckpointPermission.checkpoint == name).exists()
    )


def _allowed_model(session: Session, user: User, name: str) -> Model | None:
    """A fine-tuned model of another project, unless one of the own project has the same name."""
    query = select(Model).join(Job, Job.id == Model.job_id).where(Model.name == name, Model.deleted_at.is_(None), Model.step.is_(None))
    own = select(Model.id).where(Model.name == name, visible(user)).exists()
    return session.scalar(query.where(_permission(user, name), ~own).limit(1))


def _resolve_checkpoint(session: Session, user: User, name: str, allowed: bool) -> Resolved:
    query = select(Checkpoint, Job).join(Job, Checkpoint.job_id == Job.id)
    mine = Job.project_id == user.project_id
    seen = mine | _permission(user, name) if allowed else mine
    query = query.where(Checkpoint.deleted_at.is_(None), Job.deleted_at.is_(None), seen)
    if match := _CHECKPOINT.fullmatch(name):
        low = uuid.UUID(hex=match["job"] + "0" * 20)
        high = uuid.UUID(hex=match["job"] + "f" * 20)
        query = query.where(Job.id.between(low, high), Checkpoint.step == int(match["step"]))
    else:
        query = query.where(Checkpoint.id == ids.parse(ids.CHECKPOINT, name, param="model"))
    found = session.execute(query).first()
    if found is None or (match and match[1] != tuned_name(session, found[1])):
        raise NotFound(
            gettext("No such checkpoint: %(name)s.", name=repr(name[:160])),
            hint=gettext("A job keeps its newest checkpoints and its best one; its page lists those still there."),
            param="model",
        )
    checkpoint, job = found
    base = session.get_one(Model, job.model_id)
    tuned = session.scalar(select(Model).where(Model.job_id == job.id, Model.step.is_(None), Model.deleted_at.is_(None)))
    return Resolved(tuned or base, checkpoint, _checkpoint_reference(session, base, job, checkpoint))


def _checkpoint_reference(session: Session, base: Model, job: Job, checkpoint: Checkpoint) -> ModelRef:
    """The base with the checkpoint's adapter, or the checkpoint's own weights where it is a whole model."""
    try:
        folder = places.verified(checkpoint.path)
        whole = manifest.sha256_of(folder / manifest.NAME) == checkpoint.manifest_sha256
    except BadData:
        whole = False
    if not whole:
        raise BadData(
            gettext("The checkpoint of step %(step)s is no longer whole on disk.", step=checkpoint.step),
            hint=gettext("Choose another checkpoint of the job."),
            param="model",
        )
    made = reference(session, base).tuned(job.spec["strategy"]["name"], f"{checkpoint.path}/weights", checkpoint.manifest_sha256)
    return made.model_copy(update={"name": checkpoint_name(session, job, checkpoint.step), "labels": job.spec["model"].get("labels")})


def reference(session: Session, model: Model) -> ModelRef:
    """The weights of a model: the folder of the nearest whole model in its lineage, and the adapters to attach to it, in order.

    Raises Conflict when a part of the chain is not ready, and NotFound when it was deleted.
    """
    adapters: list[Adapter] = []
    part = model
    while part.adapter:
        _must_be_ready(part, model)
        adapters.insert(0, Adapter(strategy=part.strategy or "lora", path=part.path or "", sha256=part.adapter_sha256 or ""))
        part = session.get_one(Model, part.base_id)
    _must_be_ready(part, model)
    return ModelRef(
        id=model.id,
        name=model.name,
        kind=model.kind,
        path=part.path or "",
        revision=part.revision or "",
        adapters=tuple(adapters),
        shape=Shape.model_validate(part.shape),
        labels=tuple(model.labels) if model.labels else None,
    )


def _must_be_ready(part: Model, wanted: Model) -> None:
    if part.deleted_at is not None:
        raise NotFound(
            gettext("%(model)s needs %(part)s, which was deleted.", model=wanted.name, part=part.name),
            hint=gettext("Add that model again."),
            param="model",
        )
    if part.status == "fetching":
        raise Conflict(
            gettext("%(part)s is still being fetched.", part=part.name),
            hint=gettext("Wait until the page Models shows it as ready."),
            param="model",
        )
    if part.status != "ready":
        reason = (part.error or {}).get("message", gettext("It could not be fetched."))
        raise Conflict(
            gettext("%(part)s cannot be used. %(reason)s", part=part.name, reason=reason),
            hint=gettext("Open it on the page Models and try again."),
            param="model",
        )


# Tuned models -------------------------------------------------------------------------------------------------------


def base_of(session: Session, model: Model) -> Model:
    """The model at the root of the lineage, which was not fine-tuned here."""
    while model.base_id is not None:
        model = session.get_one(Model, model.base_id)
    return model


def tuned_name(session: Session, job: Job) -> str:
    """`ft:{base}:luthier:{suffix}:{first 12 digits of the job's id}`: the name of the job's result, also before it exists."""
    base = base_of(session, session.get_one(Model, job.model_id))
    suffix = re.sub(r"[^A-Za-z0-9._-]+", "-", str((job.order or {}).get("suffix") or "")).strip("-")[:64]
    return f"ft:{base.name}:{ORGANIZATION}:{suffix}:{job.id.hex[:12]}"


def checkpoint_name(session: Session, job: Job, step: int) -> str:
    """`…:ckpt-step-N`: the name by which `model=` takes one checkpoint of a job."""
    return f"{tuned_name(session, job)}:ckpt-step-{step}"


def register_tuned(session: Session, job: Job, finished: Finished) -> Model:
    """The row of a job's result. Called inside the fenced finish; a unique index on `job_id` makes it idempotent."""
    existing = session.scalar(select(Model).where(Model.job_id == job.id, Model.step.is_(None)))
    if existing is not None:
        return existing
    base = session.get_one(Model, job.model_id)
    strategy = job.spec["strategy"]["name"]
    model = Model(
        owner_id=job.owner_id,
        project_id=job.project_id,
        name=tuned_name(session, job),
        title=job.name,
        kept=job.comparison_id is None,
        kind=finished.kind,
        base_id=base.id,
        job_id=job.id,
        strategy=strategy,
        adapter=STRATEGIES[strategy].adapter,
        status="ready",
        path=finished.path,
        revision=finished.revision,
        adapter_sha256=finished.adapter_sha256,
        source={"from": "job", "job": ids.public(ids.JOB, job.id)},
        license=base.license,
        shape=shape_of_result(job, finished) or base.shape,
        labels=finished.labels,
        bytes=finished.bytes,
    )
    session.add(model)
    session.flush()
    return model


def keep(model: Model) -> Model:
    """Offer a comparison's result wherever models are chosen. Idempotent."""
    model.kept = True
    return model


def lineage(session: Session, model: Model) -> list[Model]:
    """From the base to this model, both included; deleted ones too, so that the history stays complete."""
    chain = [model]
    while chain[0].base_id is not None:
        chain.insert(0, session.get_one(Model, chain[0].base_id))
    return chain


def children(session: Session, user: User, model: Model, limit: int) -> list[Model]:
    """The models of this person fine-tuned (or merged) directly from a model and not deleted, newest first."""
    return list(
        session.scalars(select(Model).where(visible(user), Model.base_id == model.id).order_by(Model.created_at.desc()).limit(limit))
    )


def made_of(session: Session, model: Model) -> Provenance:
    """The parts that a download of the model needs from elsewhere, down to the nearest whole weights."""
    laid: list[AppliedAdapter] = []
    part = model
    while part.adapter:
        laid.insert(0, AppliedAdapter(part.name, _strategy_of(session, part), has_new_tokens(part.path)))
        part = session.get_one(Model, part.base_id)
    base = None if part.id == model.id else upstream(part) if part.base_id is None else part.name
    head = _strategy_of(session, model) if model.kind in ("classifier", "reward") and model.strategy else None
    hidden = int((model.shape or {}).get("hidden") or 0)
    encodes = model.shape is not None and Shape.model_validate(model.shape).encodes
    return Provenance(base, tuple(laid), hidden, len(model.labels or ()), head, encodes)


def _strategy_of(session: Session, model: Model) -> Strategy:
    """The strategy that made a fine-tuned or merged model, with its settings."""
    while model.job_id is None and model.base_id is not None:  # a merged model is its adapter in another form
        model = session.get_one(Model, model.base_id)
    job = session.get(Job, model.job_id) if model.job_id else None
    name = model.strategy or "lora"
    return STRATEGIES[name].model_validate(job.spec["strategy"] if job and job.spec["strategy"]["name"] == name else {"name": name})


# Deleting -----------------------------------------------------------------------------------------------------------


def delete(session: Session, user: User, model: Model) -> None:
    """Delete a model: its row stays for the history, its name becomes free, its files are removed after the commit.

    Raises Conflict, naming what depends on it.
    """
    session.refresh(model, with_for_update=True)
    reasons, further = dependants(session, model)
    if reasons:
        more = len(reasons) - 3 + further
        told = [*reasons[:3], *([ngettext("And %(num)s more.", "And %(num)s more.", more)] if more > 0 else [])]
        raise Conflict(
            gettext("%(model)s is still needed. %(reasons)s", model=model.name, reasons=" ".join(told)),
            hint=gettext("Delete, cancel or move those first."),
            param="model",
            code="model_in_use",
        )
    model.deleted_at = func.clock_timestamp()
    session.flush()
    downloaded = hub.downloads(model.id)
    on_commit(session, lambda: shutil.rmtree(downloaded, ignore_errors=True))
    folder = own_folder(model)
    if folder is not None:
        on_commit(session, lambda: shutil.rmtree(folder, ignore_errors=True))


def own_folder(model: Model) -> Path | None:
    """The model's folder under the data folder; None when it has none. Refuses a path outside of it."""
    if not model.path:
        return None
    root = get_settings().data_dir
    folder = (root / model.path).resolve()
    if root.resolve() not in folder.parents:
        raise BadField(gettext("The path of %(model)s lies outside the data folder.", model=model.name))
    return folder


def hashes(model: Model) -> dict[str, dict[str, Any]]:
    """`{file: {"bytes", "sha256"}}` from the model's manifest; empty when it has none."""
    found = manifest.read(places.path(str(model.path), weights=False)) if own_folder(model) else None
    return found["files"] if found else {}


def root(model: Model) -> Model:
    """The root of the lineage; without a query where all its models are in the session."""
    while model.base is not None:
        model = model.base
    return model


def option_text(model: Model, title: str = "") -> str:
    """The label of a model where one is chosen: `chats with LoRA · SmolLM2 135M · 2026-11-29 10:04 UTC`; of a base its title alone.
    `title` replaces the model's own."""
    title, base = title or model.title, root(model)
    return title if base is model else f"{title} · {base.title} · {model.created_at:%Y-%m-%d %H:%M} UTC"


def origin(session: Session, resolved: Resolved) -> tuple[Job | None, Model | None]:
    """The job that made a model or checkpoint, and the model it was fine-tuned from; (None, None) for a base."""
    if resolved.checkpoint is not None:
        job = session.get_one(Job, resolved.checkpoint.job_id)
        return job, session.get_one(Model, job.model_id)
    model = resolved.model
    while model.job_id is None and model.base_id is not None:  # a merged model is its adapter in another form
        model = session.get_one(Model, model.base_id)
    if model.job_id is None or model.base_id is None:
        return None, None
    return session.get(Job, model.job_id), session.get_one(Model, model.base_id)
