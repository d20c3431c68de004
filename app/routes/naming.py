"""Names and tags of jobs, models, datasets and comparisons, and bulk actions on selected rows of a list."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple
from urllib.parse import urlencode

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response
from pydantic import BaseModel, Field
from sqlalchemy.orm import Session

from app import naming, schemas
from app.datasets import service as datasets
from app.db import Db
from app.errors import BadField, StudioError
from app.evaluation import comparison_json, comparisons
from app.jobs import service as jobs
from app.kit import ids
from app.kit.humanize import human_number
from app.languages import gettext, mark, ngettext
from app.models import service as models
from app.routes import models as model_routes
from app.routes import versions
from app.schemas.openapi import answers
from app.searches import service as searches
from app.tables import User
from app.views import job_json, run_comparison
from app.web.auth import CurrentUser
from app.web.templates import flash

api = APIRouter(prefix="/v1")
pages = APIRouter()
Json = dict[str, Any]
Place = Literal["jobs", "models", "datasets", "compare", "searches"]
MAX_TOLD = 5
"""Maximum number of refusals that are reported one by one."""


class NamedKind(NamedTuple):
    """The kind of object that a list holds: its name, and functions that tell what was done to them, find one, check the permission to
    change it, and delete it."""

    title: str
    counted: Callable[[Literal["deleted", "tagged", "refused"], int, str], str]
    """What was done to so many of them, as a sentence, with the tags."""
    find: Callable[[Session, User, str], Any]
    delete: Callable[[Session, User, Any], None]
    tagged: bool = True


def _model(session: Session, user: User, key: str) -> Any:
    found = models.get(session, user, key)
    model_routes.may_change(user, found)
    return found


def _runs(done: str, count: int, tags: str) -> str:
    if done == "deleted":
        return ngettext("%(num)s run deleted.", "%(num)s runs deleted.", count)
    if done == "tagged":
        return ngettext("%(num)s run tagged %(tags)s.", "%(num)s runs tagged %(tags)s.", count, tags=tags)
    return ngettext("%(num)s run refused.", "%(num)s runs refused.", count)


def _models(done: str, count: int, tags: str) -> str:
    if done == "deleted":
        return ngettext("%(num)s model deleted.", "%(num)s models deleted.", count)
    if done == "tagged":
        return ngettext("%(num)s model tagged %(tags)s.", "%(num)s models tagged %(tags)s.", count, tags=tags)
    return ngettext("%(num)s model refused.", "%(num)s models refused.", count)


def _datasets(done: str, count: int, tags: str) -> str:
    if done == "deleted":
        return ngettext("%(num)s dataset deleted.", "%(num)s datasets deleted.", count)
    if done == "tagged":
        return ngettext("%(num)s dataset tagged %(tags)s.", "%(num)s datasets tagged %(tags)s.", count, tags=tags)
    return ngettext("%(num)s dataset refused.", "%(num)s datasets refused.", count)


def _comparisons(done: str, count: int, tags: str) -> str:
    if done == "deleted":
        return ngettext("%(num)s comparison deleted.", "%(num)s comparisons deleted.", count)
    return ngettext("%(num)s comparison refused.", "%(num)s comparisons refused.", count)


def _searches(done: str, count: int, tags: str) -> str:
    if done == "deleted":
        return ngettext("%(num)s search deleted.", "%(num)s searches deleted.", count)
    return ngettext("%(num)s search refused.", "%(num)s searches refused.", count)


KINDS: dict[Place, NamedKind] = {
    "jobs": NamedKind(
        mark("run"), _runs, lambda s, u, key: jobs.get(s, u, ids.parse(ids.JOB, key)), lambda s, u, job: jobs.delete(s, u, job.id)
    ),
    "models": NamedKind(mark("model"), _models, _model, models.delete),
    "datasets": NamedKind(
        mark("dataset"), _datasets, lambda s, u, key: datasets.get(s, u, ids.parse(ids.DATASET, key)), datasets.delete_line
    ),
    "compare": NamedKind(
        mark("comparison"),
        _comparisons,
        lambda s, u, key: comparisons.get(s, u, ids.parse(ids.COMPARISON, key)),
        lambda s, u, found: comparisons.delete(s, u, found.id),
        tagged=False,
    ),
    "searches": NamedKind(
        mark("search"),
        _searches,
        lambda s, u, key: searches.get(s, u, ids.parse(ids.SEARCH, key)),
        lambda s, u, found: searches.delete(s, u, found.id),
        tagged=False,
    ),
}


# JSON ---------------------------------------------------------------------------------------------------------------


class NewName(BaseModel, extra="forbid"):
    name: str = Field(description=f"One line of at most {naming.MAX_NAME_LENGTH} characters.")


class NewNaming(BaseModel, extra="forbid"):
    """Omitted fields are unchanged."""

    name: str | None = Field(None, description=f"One line of at most {naming.MAX_NAME_LENGTH} characters.")
    tags: list[str] | None = Field(None, description=f"All its tags, at most {naming.MAX_TAGS}.")


class NewModelNaming(BaseModel, extra="forbid"):
    """Omitted fields are unchanged."""

    title: str | None = Field(
        None, description=f"One line of at most {naming.MAX_NAME_LENGTH} characters. The name that requests use stays."
    )
    tags: list[str] | None = Field(None, description=f"All its tags, at most {naming.MAX_TAGS}.")
    kept: Literal[True] | None = Field(None, description="Offer a comparison's result in the lists of models.")


def _change(session: Session, found: Any, name: str | None, tags: list[str] | None) -> None:
    if name is not None:
        naming.rename(session, found, name)
    if tags is not None:
        naming.tag(session, found, tags)
    session.flush()


@api.patch("/fine_tuning/jobs/{job_id}", operation_id="update_job", responses=answers(schemas.FineTuningJob, 404))
def change_job(session: Db, user: CurrentUser, job_id: str, change: NewNaming) -> Json:
    """Rename or tag a job."""
    job = KINDS["jobs"].find(session, user, job_id)
    _change(session, job, change.name, change.tags)
    return job_json.of(session, job)


@api.patch("/models/{model:path}", operation_id="update_model", responses=answers(schemas.Model, 404))
def change_model(session: Db, user: CurrentUser, model: str, change: NewModelNaming) -> Json:
    """Rename, tag or keep a model."""
    found = _model(session, user, model)
    _change(session, found, change.title, change.tags)
    if change.kept:
        models.keep(found)
    return model_routes.to_json(session, found)


@api.patch("/datasets/{key}", operation_id="update_dataset", responses=answers(schemas.Dataset, 404))
def change_dataset(session: Db, user: CurrentUser, key: str, change: NewNaming) -> Json:
    """Rename or tag a dataset in all its versions."""
    dataset = KINDS["datasets"].find(session, user, key)
    _change(session, dataset, change.name, change.tags)
    return versions.to_json(dataset)


@api.patch("/comparisons/{comparison_id}", operation_id="update_comparison", responses=answers(schemas.Comparison, 404))
def change_comparison(session: Db, user: CurrentUser, comparison_id: str, change: NewName) -> Json:
    """Rename a comparison."""
    found = KINDS["compare"].find(session, user, comparison_id)
    _change(session, found, change.name, None)
    return comparison_json.to_json(session, found)


# Pages --------------------------------------------------------------------------------------------------------------


@pages.post("/{place}/{key}/name")
def rename(
    session: Db, user: CurrentUser, place: Place, key: str, name: Annotated[str, Form()], tags: Annotated[str | None, Form()] = None
) -> Response:
    """The Rename form of a page: a name, and comma-separated tags."""
    kind = KINDS[place]
    _change(session, kind.find(session, user, key), name, naming.words(tags) if tags is not None and kind.tagged else None)
    return RedirectResponse(f"/{place}/{key}", status_code=303)


@pages.post("/{place}/bulk")
def bulk(
    request: Request,
    session: Db,
    user: CurrentUser,
    place: Place,
    do: Annotated[Literal["delete", "tag", "compare"], Form()],
    pick: Annotated[list[str] | None, Form()] = None,
    tag: Annotated[str, Form()] = "",
    query: Annotated[str, Form()] = "",
) -> Response:
    """Delete, tag or compare the selected rows. Refused rows are reported with the reason; the others are processed."""
    kind, picked = KINDS[place], list(dict.fromkeys(pick or ()))
    here = f"/{place}?{query}" if query else f"/{place}"
    added = naming.words(tag)
    if missing := _missing(do, place, len(picked), added):
        flash(request, missing, "warn")
        return RedirectResponse(here, status_code=303)
    if do == "compare" and place == "jobs":
        return RedirectResponse(f"/jobs/compare?{urlencode([('job', key) for key in picked])}", status_code=303)
    if do == "compare" or (do == "tag" and not kind.tagged):
        title = gettext(kind.title)
        if do == "compare":
            raise BadField(gettext("A %(kind)s cannot be compared here.", kind=title), param="do")
        raise BadField(gettext("A %(kind)s cannot be tagged here.", kind=title), param="do")

    def act(found: Any) -> None:
        if do == "delete":
            kind.delete(session, user, found)
        else:
            naming.tag(session, found, [*found.tags, *added])

    done, refused = _each(session, user, kind, picked, act)
    if done:
        flash(request, kind.counted("deleted" if do == "delete" else "tagged", done, ", ".join(added)))
    if refused:
        more = [gettext("And %(num)s more.", num=human_number(len(refused) - MAX_TOLD))] if len(refused) > MAX_TOLD else []
        flash(request, " ".join([kind.counted("refused", len(refused), ""), *refused[:MAX_TOLD], *more]), "bad")
    return RedirectResponse(here, status_code=303)


def _missing(do: str, place: str, picked: int, added: list[str]) -> str | None:
    """The input that is missing, shown above the list."""
    if not picked:
        return gettext("No row is selected. Select at least one.")
    if do == "compare" and place == "jobs" and not 2 <= picked <= run_comparison.MOST:
        return ngettext(
            "%(num)s run selected. Select 2 to %(most)s to compare.",
            "%(num)s runs selected. Select 2 to %(most)s to compare.",
            picked,
            most=run_comparison.MOST,
        )
    if do == "tag" and not added:
        return gettext("No tag was written. Write at least one, with commas between them.")
    return None


def _each(session: Session, user: User, kind: NamedKind, picked: list[str], act: Callable[[Any], None]) -> tuple[int, list[str]]:
    """(number of rows processed, reasons of the others), each row in a savepoint of its own."""
    done, refused = 0, []
    for key in picked:
        name = key
        try:
            with session.begin_nested():
                found = kind.find(session, user, key)
                name = getattr(found, "title", None) or found.name
                act(found)
                session.flush()
            done += 1
        except StudioError as error:
            refused.append(f"{name}: {error}" if name not in str(error) else str(error))
    return done, refused
