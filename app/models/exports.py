"""Exports: a model written in a format for other programs, compared with the model, and kept to be downloaded.

    queued ──claim──▶ running ──finish──▶ succeeded ──push──▶ queued, with `files` and `hub`
      ▲                 │ ├────fail────▶ failed
      │                 │ └───cancel───▶ cancelled
      └────requeue──────┘     a worker that died; after three deaths it failed

An export that has its files has succeeded, whatever becomes of a push to the hub: `hub` tells of that, and its end is `succeeded` again.

The work is done by a confined child (`worker/exporters/_process.py`), which writes to a temporary folder; an attempt after one that was
interrupted begins with the files that were completed there. All are moved to `exports/<id>/` when they are complete and answer as they should.
"""

from __future__ import annotations

import json
import shutil
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict
from sqlalchemy import select, update
from sqlalchemy.orm import Session

from app import db, export_formats, leases, limits, queue
from app.errors import BadData, BadField, Conflict, DiskFull, NotFound, StudioError, Unavailable, Unsupported
from app.export_formats import PART, ExportFormat, ModelFacts
from app.kit.humanize import human_number
from app.kit.json_safe import storable
from app.kit.states import state_word
from app.languages import gettext
from app.leases import now
from app.models import hub, hub_upload, integrity, starters
from app.models import service as models
from app.models.export_facts import facts_of
from app.models.model_card import about, upstream
from app.ownership import mine, owned
from app.settings import get_settings
from app.spec import ModelRef
from app.storage import places
from app.tables import JSON, Export, Model, User

OPEN = ("queued", "running")
LINES = "parity-lines.json"
"""In the folder of an attempt: the files that were compared, each with its line of the table."""
SECONDS = 6 * 3600
"""How long one export may take: a large model in many types on a few cores takes hours."""
SPARE_BYTES = 256 * 2**20
"""Room that an export leaves on the disk, which the database needs too."""
FULL_BYTES = 2**20
"""A disk with less room than this is full."""


class ExportSpec(BaseModel):
    """The frozen request: all that the child is given. `base` is the model without its last adapter; `job` is the spec of the job that made
    it, whose held-out rows are compared."""

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


# Requests -----------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, name: str, format: str, types: Sequence[str] | None = None, system: str = "") -> Export:
    """A queued export of a model, a checkpoint or a blend and its message. An equal one that waits or runs is given instead of a second.

    Raises NotFound, BadField for an unknown format or type, Unsupported with the reason where the format cannot hold the model,
    Conflict while the model is not ready, LimitReached, and DiskFull.
    """
    kind, resolved = export_formats.get(format), models.resolve(session, user, name)
    if resolved.model.answered_elsewhere:
        raise BadField(
            gettext("%(model)s answers through another server; its weights are not here.", model=resolved.ref.name),
            hint=gettext("Take a model of this studio."),
            param="model",
        )
    facts = facts_of(resolved.ref)
    if reason := kind.accepts(facts):
        raise Unsupported(
            gettext("%(model)s cannot be exported as %(format)s. %(reason)s", model=resolved.ref.name, format=kind.title, reason=reason),
            hint=gettext("Choose another format."),
            param="format",
        )
    chosen = kind.chosen(types)
    _check_room(kind, facts, chosen)
    spec = _spec(session, resolved, kind, chosen, system)
    frozen = storable(spec.model_dump(mode="json"))
    equal = mine(Export, user, Export.status.in_(OPEN), Export.spec == frozen)
    if (earlier := session.scalar(equal.limit(1))) is not None:
        return earlier
    limits.check(session, user, "storage_bytes", more=kind.bytes_of(facts, chosen))
    export = Export(
        id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, model_id=resolved.model.id, format=kind.name, spec=frozen, files=[]
    )
    session.add(export)
    session.flush()
    queue.enqueue(session, queue.EXPORT, export.id)
    session.refresh(export)
    return export


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
            gettext(
                "This export takes about %(needed)s GB, and %(free)s GB of the disk are free.",
                needed=human_number(needed / 1e9, 1),
                free=human_number(free / 1e9, 1),
            ),
            hint=gettext("Choose fewer or smaller types, or make room on the disk of the data folder."),
            param="types",
        )


# Reading ------------------------------------------------------------------------------------------------------------


def of_model(session: Session, user: User, model: Model) -> list[Export]:
    """Exports of one model, newest first."""
    found = mine(Export, user, Export.model_id == model.id).order_by(Export.created_at.desc(), Export.id)
    return list(session.scalars(found.limit(50)))


def cancel(session: Session, user: User, export_id: uuid.UUID) -> Export:
    """Stop one that waits or runs, or its push: the worker notices at its next heartbeat. One that has ended stays as it is."""
    query = select(Export).where(Export.id == owned(session, Export, user, export_id).id).with_for_update()
    found = session.scalars(query.execution_options(populate_existing=True)).one()
    if found.status in OPEN:
        found.lease_until, found.stage = None, None
        if found.files:
            found.status, found.hub = "succeeded", {**(found.hub or {}), "status": "cancelled"}
            _forget_token(session, export_id)
        else:
            found.status, found.finished_at = "cancelled", session.scalar(select(now()))
            _forget_files(session, export_id)
        session.flush()
    return found


def delete(session: Session, user: User, export_id: uuid.UUID) -> None:
    """Delete it with its files; one that runs is stopped."""
    cancel(session, user, export_id).deleted_at = session.scalar(select(now()))
    session.flush()
    _forget_files(session, export_id)


def _forget_files(session: Session, export_id: uuid.UUID) -> None:
    """Once this is committed: the files, and what an attempt left that was interrupted."""

    def forget() -> None:
        for path in (folder_of(export_id), *_work_folders(export_id)):
            shutil.rmtree(path, ignore_errors=True)

    db.on_commit(session, forget)


def _forget_token(session: Session, export_id: uuid.UUID) -> None:
    db.on_commit(session, lambda: hub_upload.forget_token(export_id))


def push(session: Session, user: User, export_id: uuid.UUID, repo: str, private: bool = True, token: str | None = None) -> Export:
    """Queue the upload of a finished export to a repository of the hub. Without a token that of the worker's environment is used, which
    is the operator's, so only an admin may leave it out.

    Raises BadField, Conflict while there are no files or another push runs, and Unavailable when the studio stays offline.
    """
    hub.check_name(repo, None)
    if "/" not in repo:
        raise BadField(gettext("%(repo)s names no owner.", repo=repr(repo[:80])), hint=gettext("It looks like `owner/name`."), param="repo")
    if token is None and user.role != "admin":
        raise BadField(
            gettext("A token of the hub is needed."), hint=gettext("Make one with write permission in its settings."), param="token"
        )
    if token is not None:
        hub_upload.check_token(token)
    hub.must_be_allowed()
    found = owned(session, Export, user, export_id)
    wanted: JSON = {"repo": repo, "private": private, "status": "queued", "url": None, "commit": None, "error": None}
    ready = update(Export).where(Export.id == export_id, Export.status == "succeeded", Export.deleted_at.is_(None))
    queued = ready.values(status="queued", hub=wanted, deaths=0, progress=0.0, stage=None)
    if session.scalar(queued.returning(Export.id)) is None:
        state = gettext("being pushed") if found.files else state_word(found.status)
        raise Conflict(gettext("The export is %(status)s.", status=state), hint=gettext("Wait until that has ended."), code="not_ready")
    if token is not None:
        hub_upload.keep_token(export_id, token)
    queue.enqueue(session, queue.EXPORT, export_id)
    return owned(session, Export, user, export_id)


def folder_of(export_id: uuid.UUID) -> Path:
    return get_settings().data_dir / _place(export_id)


def _place(export_id: uuid.UUID) -> str:
    return f"exports/{export_id}"


def file_path(export: Export, name: str) -> Path:
    """Where one file of an export lies. Raises Conflict before it has succeeded, NotFound for a name that is not in its list."""
    if not export.files:
        raise Conflict(
            gettext("The export is %(status)s.", status=state_word(export.status)),
            hint=gettext("Wait until it has succeeded."),
            code="not_ready",
        )
    listed = name in {file["name"] for file in export.files}
    path = places.path(f"{_place(export.id)}/{name}") if listed else folder_of(export.id)
    if not listed or not path.is_file():
        raise NotFound(
            gettext("The export has no file %(name)s.", name=repr(name[:120])),
            hint=gettext("Its list of files has the names."),
            param="name",
        )
    return path


# The worker's part ----------------------------------------------------------------------------------------------------


def _died(session: Session, export: Export, how: str) -> None:
    export.stage = None
    if leases.requeue(session, WORK, export, died=True):
        return
    message = f"Its worker {how} That was death {export.deaths}."
    problem = {"code": "worker_lost", "message": message, "hint": "Look at the worker's log."}
    if export.files:
        export.status, export.hub = "succeeded", {**(export.hub or {}), "status": "failed", "error": problem}
        _forget_token(session, export.id)
        return
    export.status, export.finished_at = "failed", session.scalar(select(now()))
    export.error = problem | {"hint": "Look at the worker's log; fewer types may help."}
    _forget_files(session, export.id)  # a worker can die between moving its files and recording them


WORK = leases.Work(Export, queue.EXPORT, waits_as="queued", runs_as="running", since=Export.created_at, on_death=_died)


class Held(NamedTuple):
    """An export that this worker has claimed. With files it is pushed to the hub, otherwise it is written."""

    id: uuid.UUID
    fence: int
    spec: ExportSpec
    model_id: uuid.UUID
    files: list[Any]
    hub: JSON | None

    def failed(self, problem: JSON) -> JSON:
        """The columns that say that it failed."""
        if self.files:
            return {"status": "succeeded", "hub": {**(self.hub or {}), "status": "failed", "error": problem}}
        return {"status": "failed", "error": problem}


def run(export_id: uuid.UUID, going_down: Callable[[], bool] = lambda: False) -> None:
    """Write or push one export, if nobody else is at it. The body of the task EXPORT: it opens its own transactions."""
    if going_down():
        return  # the reaper announces it again
    with db.transaction() as session:
        found = leases.claim(session, WORK, export_id, progress=0.0, stage=None)
        if found is None:
            return
        held = Held(found.id, found.fence, ExportSpec.model_validate(found.spec), found.model_id, found.files, found.hub)
    work, leave = _work_path(export_id, held.fence), True
    try:
        _take_over(export_id, work)
        outcome = (_pushed if held.files else _written)(held, work, _teller(held, work, going_down))
    except _GoingDown:
        leave = False
        with db.transaction() as session:
            row = leases.lock_if_held(session, WORK, export_id, held.fence)
            if row is not None:
                leases.requeue(session, WORK, row)
    except ExportLost:
        pass
    except (StudioError, OSError) as error:
        if isinstance(error, integrity.Damaged):
            integrity.tell(error)
        problem = _full() if shutil.disk_usage(work.parent).free < FULL_BYTES else error
        if not isinstance(problem, StudioError):
            problem = Unavailable(
                f"The export cannot be written: {error}", hint="Look at the disk of the data folder.", code="cannot_write"
            )
        _finish(held, work, **held.failed(problem.as_problem()))
    except Exception as error:
        message = f"The export failed: {type(error).__name__}: {str(error)[:300]}"
        _finish(held, work, **held.failed({"code": "internal_error", "message": message, "hint": "Try again."}))
        raise
    else:
        _finish(held, work, **outcome)
    finally:
        if leave:
            shutil.rmtree(work, ignore_errors=True)


def _full() -> DiskFull:
    """The error of whatever a child ends with on a full disk, where it may not even have room to say so."""
    return DiskFull("The disk of the data folder filled up while the files were written; none was kept.")


def _work_path(export_id: uuid.UUID, fence: int) -> Path:
    """The folder of one attempt."""
    return get_settings().folder("tmp") / f"export-{export_id}-{fence}"


def _take_over(export_id: uuid.UUID, work: Path) -> None:
    """Make the folder of this attempt, with the files that were completed by the attempts before, whose workers left or died. A worker that
    was only taken for dead does not find this folder, and changes nothing in a file that is complete."""
    work.mkdir()
    for earlier in _work_folders(export_id):
        if earlier == work:
            continue
        done = [path for path in earlier.glob("out/**/*") if path.is_file() and not path.is_symlink() and path.suffix != PART]
        for path in [*done, *earlier.glob(LINES)]:
            place = work / path.relative_to(earlier)
            place.parent.mkdir(parents=True, exist_ok=True)
            if not place.exists():
                path.rename(place)
        shutil.rmtree(earlier, ignore_errors=True)


def _work_folders(export_id: uuid.UUID) -> list[Path]:
    return list(get_settings().folder("tmp").glob(f"export-{export_id}-*"))


class _GoingDown(Exception):
    """This worker was asked to leave: the export begins again elsewhere."""


def _teller(held: Held, work: Path, going_down: Callable[[], bool]) -> Callable[[], None]:
    """The heartbeat: it records what the child wrote into `work/progress.json`, and raises ExportLost or _GoingDown to stop."""
    beat, progress = leases.Beat(WORK, held.id, held.fence), work / "progress.json"

    def tell() -> None:
        if going_down():
            raise _GoingDown
        try:
            said = json.loads(progress.read_text())
        except (OSError, ValueError):
            said = {}
        if not beat(**{name: said[name] for name in ("progress", "stage") if name in said}):
            raise ExportLost

    return tell


def _written(held: Held, work: Path, tell: Callable[[], None]) -> JSON:
    """Have the files written to `work/out` and compared; the columns that say how it went. Raises ExportLost and StudioError."""
    spec = held.spec
    with db.transaction() as session:
        gone = session.get_one(Model, held.model_id).deleted_at is not None
    if gone:
        raise Conflict(f"{spec.model.name} was deleted.", hint="Export a model that is there.")
    order, into = work / "order.json", work / "out"
    order.write_text(spec.model_dump_json())
    with places.held(reads := _reads(spec), tell):
        integrity.check_model(spec.model, tell)
        readable = [get_settings().data_dir / path for path in reads]
        facts = starters.ask_child(
            "worker.exporters._process", [str(order), str(into)], [], into, tell, readable, seconds=SECONDS, sockets="loopback"
        )
    found = {"parity": storable(facts["parity"]), "progress": 1.0}
    if facts["fault"]:
        return {**found, "status": "failed", "error": facts["fault"]}
    there = [path for path in into.rglob("*") if path.is_symlink() or not path.is_dir()]
    names = sorted(path.relative_to(into).as_posix() for path in there)
    if names != sorted(file["name"] for file in facts["files"]) or any(path.is_symlink() for path in there):
        raise BadData("The exporter left other files than it named.", hint="Report this.")
    for one in sorted(into.iterdir()):
        places.push(f"{_place(held.id)}/{one.name}", source=one, beat=tell)
    return {**found, "status": "succeeded", "files": storable(facts["files"])}


def _pushed(held: Held, work: Path, tell: Callable[[], None]) -> JSON:
    """Have the files uploaded to the hub; the columns that say so. Raises ExportLost and StudioError."""
    assert held.hub is not None, "an export with files is only queued to be pushed"
    order = {"repo": held.hub["repo"], "private": held.hub["private"], "files": [file["name"] for file in held.files]}
    with places.held([f"{_place(held.id)}/{file['name']}" for file in held.files], tell):
        found = hub_upload.upload(held.id, folder_of(held.id), order, work, tell)
    return {"status": "succeeded", "progress": 1.0, "hub": {**held.hub, **found, "status": "succeeded"}}


def _reads(spec: ExportSpec) -> list[str]:
    """What the child reads, in paths relative to the data folder."""
    rows = [part["path"] for name in ("dataset", "validation") if (part := (spec.job or {}).get(name))]
    return [path for path in (spec.model.path, *(adapter.path for adapter in spec.model.adapters), *rows) if path]


def _finish(held: Held, work: Path, **values: Any) -> None:
    """Record how it ended, unless it is no longer held. New files are moved while the row is locked, so a worker that was taken for dead
    replaces nobody's files, and an export that is deleted takes its files along."""
    with db.transaction() as session:
        row = leases.lock_if_held(session, WORK, held.id, held.fence)
        if row is None:
            return
        if "files" in values:
            starters.move_into_place(work / "out", folder_of(held.id))
        for name, value in {**values, "stage": None, "lease_until": None}.items():
            setattr(row, name, value)
        if held.files:
            _forget_token(session, held.id)
        else:
            row.finished_at = session.scalar(select(now()))


def reap(session: Session) -> dict[str, int]:
    """The relay's round."""
    return leases.reap(session, WORK)
