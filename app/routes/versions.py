"""What makes a new version of a dataset from a page: fixes by click, dropped rows; and findings to take away."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Form, Request
from fastapi.responses import RedirectResponse, Response, StreamingResponse

from app import datasets, findings, ids, versions
from app.accounts import CurrentUser
from app.db import Db
from app.errors import BadField
from app.tables import Dataset, User
from app.web import flash

pages = APIRouter()
Key = str


def dataset_of(session: Db, user: User, key: str) -> Dataset:
    return datasets.get(session, user, ids.parse(ids.DATASET, key))


def path_of(dataset: Dataset) -> str:
    return f"/datasets/{ids.public(ids.DATASET, dataset.id)}"


@pages.post("/datasets/{key}/fix")
def fix(
    request: Request,
    user: CurrentUser,
    session: Db,
    key: Key,
    finding: Annotated[int | None, Form()] = None,
    rule: Annotated[str | None, Form()] = None,
) -> Response:
    """Apply the fix of one finding, or of all under a rule; the answer leads to the new version."""
    dataset = dataset_of(session, user, key)
    if finding is not None:
        new = versions.fix_one(session, user, dataset, finding)
    elif rule:
        new = versions.fix_all(session, user, dataset, rule)
    else:
        raise BadField("Nothing to fix was named.", way_out="Send finding, or rule.", param="finding")
    flash(request, f"Version {new.version} is made; version {dataset.version} stays as it is.")
    return RedirectResponse(path_of(new), 303)


@pages.post("/datasets/{key}/drop")
def drop(request: Request, user: CurrentUser, session: Db, key: Key, line: Annotated[list[int], Form()]) -> Response:
    dataset = dataset_of(session, user, key)
    new = versions.drop_rows(session, user, dataset, line)
    flash(request, f"Version {new.version} leaves out {len(set(line))} row{'s' if len(set(line)) != 1 else ''}.")
    return RedirectResponse(path_of(new), 303)


@pages.get("/datasets/{key}/findings.{kind}")
def download(user: CurrentUser, session: Db, key: Key, kind: Literal["csv", "jsonl"]) -> Response:
    dataset = dataset_of(session, user, key)
    media = {"csv": "text/csv; charset=utf-8", "jsonl": "application/x-ndjson"}[kind]
    name = f"findings-{ids.public(ids.DATASET, dataset.id)}.{kind}"
    return StreamingResponse(
        findings.download(dataset.id, kind), media_type=media, headers={"content-disposition": f'attachment; filename="{name}"'}
    )
