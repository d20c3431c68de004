"""Exports: a model written in a format for other programs, compared with the model, and kept to be downloaded.

    queued ──claim──▶ running ──finish──▶ succeeded
      ▲                 │ ├────fail────▶ failed
      │                 │ └───cancel───▶ cancelled
      └────requeue──────┘     a worker that died; after three deaths it failed

The work is done by a child behind walls (`worker/exporters/_process.py`), which writes into a temporary folder. Its files are renamed
into `exports/<id>/` only when they are whole and answer as the model does, so nobody sees half of one.
"""

from __future__ import annotations

import json
import logging
import shutil
import tempfile
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict
from sqlalchemy import Select, select, update
from sqlalchemy.orm import Session

from app import db, export_formats, leases, queue
from app.errors import BadData, BadField, Conflict, DiskFull, NotFound, StudioError, Unsupported
from app.export_formats import ExportFormat, ModelFacts
from app.kit import ids
from app.kit.json_safe import storable
from app.leases import now
from app.models import integrity, starters
from app.models import service as models
from app.models.model_card import about, upstream
from app.settings import get_settings
from app.spec import ModelRef
from app.strategies import STRATEGIES
from app.tables import JSON, Export, Model, User

log = logging.getLogger(__name__)

OPEN = ("queued", "running")
SECONDS = 6 * 3600
"""How long one export may take: a large model in many types on a few cores takes hours."""
SPARE_BYTES = 256 * 2**20
"""Room that an export leaves on the disk, which the database needs too."""


class ExportSpec(BaseModel):
    """The frozen request, all that the child is told. `base` is the model without its last adapter; `job` is the spec of the job that
    made it, whose held-out rows are compared."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: str
    types: tuple[str, ...]
    model: ModelRef
    base: ModelRef | None = None
    job: dict[str, Any] | None = None
    title: str = ""
    license: str | None = None
    upstream: str | None = None
    system: str = ""
    card: str = ""


class ExportLost(Exception):
    """The export was taken over, cancelled or deleted: stop and write nothing."""


# Ordering -----------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, name: str, format: str, types: Sequence[str] | None = None, system: str = "") -> Export:
    """A queued export of a model, a checkpoint or a blend and its message. An equal one that waits or runs is given instead of a second.

    Raises NotFound, BadField for an unknown format or type, Unsupported with the reason where the format cannot hold the model,
    Conflict while the model is not ready, and DiskFull.
    """
    kind, resolved = export_formats.get(format), models.resolve(session, user, name)
    if resolved.model.engine is not None:
        raise BadField(
            f"{resolved.ref.name} answers through another server; its weights are not here.",
            hint="Take a model of this studio.",
            param="model",
        )
    facts = facts_of(resolved.ref)
    if reason := kind.accepts(facts):
        raise Unsupported(
            f"{resolved.ref.name} cannot be exported as {kind.title}. {reason}", hint="Choose another format.", param="format"
        )
    chosen = kind.chosen(types)
    _check_room(kind, facts, chosen)
    spec = _spec(session, resolved, kind, chosen, system)
    frozen = storable(spec.model_dump(mode="json"))
    if (earlier := session.scalar(mine(user).where(Export.status.in_(OPEN), Export.spec == frozen).limit(1))) is not None:
        return earlier
    export = Export(id=uuid.uuid4(), owner_id=user.id, model_id=resolved.model.id, format=kind.name, spec=frozen, files=[])
    session.add(export)
    session.flush()
    queue.enqueue(session, queue.EXPORT, export.id)
    session.refresh(export)
    return export


def facts_of(ref: ModelRef) -> ModelFacts:
    strategies = tuple(adapter.strategy for adapter in ref.adapters)
    stuck = next((STRATEGIES[name].title for name in strategies if name in STRATEGIES and not STRATEGIES[name].merges), None)
    return ModelFacts(ref.name, ref.kind, ref.shape, tuple(ref.labels or ()), strategies, stuck)


def _spec(session: Session, resolved: models.Resolved, kind: ExportFormat, types: list[str], system: str) -> ExportSpec:
    ref = resolved.ref
    job, _ = models.origin(session, resolved)
    return ExportSpec(
        format=kind.name,
        types=tuple(types),
        model=ref,
        base=ref.model_copy(update={"adapters": ref.adapters[:-1]}) if ref.adapters else None,
        job=job.spec if job is not None else None,
        title=resolved.model.title,
        license=resolved.model.license,
        upstream=upstream(models.base_of(session, resolved.model)),
        system=system,
        card=about(resolved.model, models.lineage(session, resolved.model), job),
    )


def _check_room(kind: ExportFormat, facts: ModelFacts, types: Sequence[str]) -> None:
    """Raises DiskFull when the files, and the merged weights they are made from, do not fit on the disk of the data folder."""
    merged = 2 * facts.shape.parameters() if kind.merged and facts.strategies else 0
    needed = kind.bytes_of(facts, types) + merged + SPARE_BYTES
    free = shutil.disk_usage(get_settings().data_dir).free
    if needed > free:
        raise DiskFull(
            f"This export takes about {needed / 1e9:.1f} GB, and {free / 1e9:.1f} GB of the disk are free.",
            hint="Choose fewer or smaller types, or make room on the disk of the data folder.",
            param="types",
        )


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User) -> Select[Export]:
    return select(Export).where(Export.owner_id == user.id, Export.deleted_at.is_(None))


def get(session: Session, user: User, export_id: uuid.UUID) -> Export:
    """One's own. Raises NotFound, also for another person's."""
    found = session.scalar(mine(user).where(Export.id == export_id).execution_options(populate_existing=True))
    if found is None:
        raise NotFound(f"No such export: {ids.public(ids.EXPORT, export_id)}", param="export_id")
    return found


def of_model(session: Session, user: User, model: Model) -> list[Export]:
    """Exports of one model, newest first."""
    return list(session.scalars(mine(user).where(Export.model_id == model.id).order_by(Export.created_at.desc(), Export.id).limit(50)))


def facts(session: Session, model: Model) -> ModelFacts | None:
    """What the formats are told of a model; None for one whose weights are not here."""
    try:
        return None if model.engine is not None else facts_of(models.reference(session, model))
    except StudioError:
        return None


def choices(facts: ModelFacts) -> list[tuple[ExportFormat, str | None]]:
    """Every format, and why this model cannot be written in it."""
    return [(kind, kind.accepts(facts)) for kind in export_formats.FORMATS.values()]


def cancel(session: Session, user: User, export_id: uuid.UUID) -> Export:
    """Stop one that waits or runs: its worker sees at the next beat that it is no longer wanted. One that has ended stays."""
    get(session, user, export_id)
    ended = {"status": "cancelled", "lease_until": None, "finished_at": now()}
    session.execute(update(Export).where(Export.id == export_id, Export.status.in_(OPEN)).values(**ended))
    return get(session, user, export_id)


def delete(session: Session, user: User, export_id: uuid.UUID) -> None:
    """Take it and its files away; one that runs is stopped."""
    cancel(session, user, export_id).deleted_at = session.scalar(select(now()))
    session.flush()
    db.on_commit(session, lambda: shutil.rmtree(folder_of(export_id), ignore_errors=True))


def folder_of(export_id: uuid.UUID) -> Path:
    return get_settings().data_dir / "exports" / str(export_id)


def file_path(export: Export, name: str) -> Path:
    """Where one file of an export lies. Raises Conflict before it has succeeded, NotFound for a name that is not in its list."""
    if export.status != "succeeded":
        raise Conflict(f"The export is {export.status}.", hint="Wait until it has succeeded.", code="not_ready")
    path = folder_of(export.id) / name
    if name not in {file["name"] for file in export.files} or not path.is_file():
        raise NotFound(f"The export has no file {name[:120]!r}.", hint="Its list of files has the names.", param="name")
    return path


def to_json(export: Export) -> JSON:
    """The export as the API gives it."""
    key, spec = ids.public(ids.EXPORT, export.id), export.spec
    there = export.status == "succeeded"
    return {
        "id": key,
        "object": "export",
        "model": spec["model"]["name"],
        "format": export.format,
        "types": spec["types"],
        "status": export.status,
        "progress": export.progress,
        "stage": export.stage,
        "files": [{**file, "url": f"/v1/exports/{key}/files/{file['name']}"} for file in export.files] if there else [],
        "parity": export.parity,
        "error": export.error,
        "created_at": int(export.created_at.timestamp()),
        "finished_at": int(export.finished_at.timestamp()) if export.finished_at else None,
    }


# Who runs it --------------------------------------------------------------------------------------------------------


def _died(session: Session, export: Export, how: str) -> None:
    export.stage = None
    if leases.requeue(session, WORK, export, died=True):
        return
    export.status, export.finished_at = "failed", session.scalar(select(now()))
    message = f"The worker that wrote it {how} That was death {export.deaths}."
    export.error = {"code": "worker_lost", "message": message, "hint": "Look at the worker's log; fewer types may help."}


WORK = leases.Work(Export, queue.EXPORT, waits_as="queued", runs_as="running", since=Export.created_at, on_death=_died)


def run(export_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> None:
    """Write one export, if nobody else is at it. The body of the task EXPORT: it opens its own transactions."""
    if going_down():
        return  # the reaper announces it again
    with db.transaction() as session:
        found = leases.claim(session, WORK, export_id, progress=0.0, stage=None, error=None, parity=None, files=[])
        held = (found.fence, ExportSpec.model_validate(found.spec), found.model_id) if found is not None else None
    if held is None:
        return
    fence, spec, model_id = held
    work = Path(tempfile.mkdtemp(prefix="export-", dir=get_settings().folder("tmp")))
    try:
        outcome = _written(export_id, fence, spec, model_id, work, going_down)
    except _GoingDown:
        with db.transaction() as session:
            row = leases.lock_if_held(session, WORK, export_id, fence)
            if row is not None:
                leases.requeue(session, WORK, row)
        return
    except ExportLost:
        return
    except StudioError as error:
        if isinstance(error, integrity.Damaged):
            integrity.tell(error)
        outcome = {"status": "failed", "error": error.as_problem()}
    except Exception as error:
        words = {
            "code": "internal_error",
            "message": f"The export failed: {type(error).__name__}: {str(error)[:300]}",
            "hint": "Try again.",
        }
        _finish(export_id, fence, status="failed", error=words)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if not _finish(export_id, fence, **outcome):
        _forget_unless_wanted(export_id)


class _GoingDown(Exception):
    """This worker was asked to leave: the export begins again elsewhere."""


def _written(
    export_id: uuid.UUID, fence: int, spec: ExportSpec, model_id: uuid.UUID, work: Path, going_down: Callable[[], bool]
) -> dict[str, Any]:
    """Have the files written, compared and moved into place; the columns that say so. Raises ExportLost and StudioError."""
    beat, progress = leases.Beat(WORK, export_id, fence), work / "progress.json"

    def tell() -> None:
        if going_down():
            raise _GoingDown
        try:
            said = json.loads(progress.read_text())
        except (OSError, ValueError):
            said = {}
        if not beat(**{name: said[name] for name in ("progress", "stage") if name in said}):
            raise ExportLost

    with db.transaction() as session:
        gone = session.get_one(Model, model_id).deleted_at is not None
    if gone:
        raise Conflict(f"{spec.model.name} was deleted.", hint="Export a model that is there.")
    integrity.check_model(spec.model, tell)
    order, into = work / "order.json", work / "out"
    order.write_text(spec.model_dump_json())
    facts = starters.ask_child(
        "worker.exporters._process", [str(order), str(into)], [], into, tell, _readable(spec), seconds=SECONDS, sockets="loopback"
    )
    found = {"files": storable(facts["files"]), "parity": storable(facts["parity"]), "progress": 1.0}
    if facts["fault"]:
        return {**found, "files": [], "status": "failed", "error": facts["fault"]}
    there = [path for path in into.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = sorted(path.relative_to(into).as_posix() for path in there)
    if names != sorted(file["name"] for file in facts["files"]) or any(path.is_symlink() for path in there):
        raise BadData("The exporter left other files than it named.", hint="Report this.")
    place = folder_of(export_id)
    get_settings().folder("exports")
    shutil.rmtree(place, ignore_errors=True)  # of an attempt that died just after moving
    into.rename(place)
    return {**found, "status": "succeeded"}


def _readable(spec: ExportSpec) -> list[Path]:
    data = get_settings().data_dir
    rows = [part["path"] for name in ("dataset", "validation") if (part := (spec.job or {}).get(name))]
    return [data / path for path in (spec.model.path, *(adapter.path for adapter in spec.model.adapters), *rows) if path]


def _finish(export_id: uuid.UUID, fence: int, **values: Any) -> bool:
    with db.transaction() as session:
        return leases.finish_if_held(session, WORK, export_id, fence, stage=None, finished_at=now(), **values)


def _forget_unless_wanted(export_id: uuid.UUID) -> None:
    """Remove the files of an export that was cancelled or deleted before it was recorded."""
    with db.transaction() as session:
        found = session.get(Export, export_id)
        if found is None or found.deleted_at is not None or found.status in ("cancelled", "failed"):
            shutil.rmtree(folder_of(export_id), ignore_errors=True)


def reap(session: Session) -> dict[str, int]:
    """The relay's round."""
    return leases.reap(session, WORK)
