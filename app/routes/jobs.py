"""The pages of jobs: the list, the order form, one job live, and what a person can ask of it.

The JSON twin stands in `app/routes/fine_tuning.py`; both call `app.jobs`.
"""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi import Form as Form_
from fastapi.responses import RedirectResponse, Response
from starlette.datastructures import FormData

from app import first_model, ids, jobs, live, order_form, watch
from app import job_view as view
from app.accounts import CurrentUser
from app.db import Db
from app.errors import BadField, Conflict
from app.orders import JobOrder
from app.pages import Offset
from app.tables import Job
from app.web import flash, human_number, render

pages = APIRouter()

SHOWN = 50
"""Jobs on one page of the list."""


async def _form(request: Request) -> dict[str, str]:
    """The fields of a posted form as text. Of a name sent twice the last counts: a checkbox overrules the hidden field
    before it."""
    form: FormData = await request.form()
    return {key: value for key, value in form.multi_items() if isinstance(value, str)}


Form = Annotated[dict[str, str], Depends(_form)]


@pages.get("/jobs")
def job_list(request: Request, user: CurrentUser, session: Db, shown: Annotated[int, Query(ge=1, le=5000)] = SHOWN) -> Response:
    found = jobs.list_(session, user, limit=shown + 1)
    return render(
        request,
        "jobs.html",
        rows=view.rows(found[:shown], live.best_losses(session, found[:shown])),
        summary=view.summary(found[:shown]),
        shown=shown,
        moving=any(job.status in ("queued", "running") for job in found[:shown]),
        more=shown + SHOWN if len(found) > shown else None,
    )


# Ordering -------------------------------------------------------------------------------------------------------------


@pages.get("/jobs/new")
def new_job(request: Request, user: CurrentUser, session: Db) -> Response:
    """The form for what stands in the address: `?dataset=&model=`, all it was typed so far, or `?clone=ftjob-…`."""
    typed = dict(request.query_params.multi_items())
    if clone := typed.pop("clone", ""):
        typed = order_form.typed_of(session, user, clone) | typed
    return _order_page(request, session, user, order_form.order_form(session, user, typed), typed.get("key"))


@pages.post("/jobs")
def order_job(request: Request, user: CurrentUser, session: Db, typed: Form) -> Response:
    form = order_form.order_form(session, user, typed)
    if not form.ready or form.order is None:
        return _order_page(request, session, user, form, typed.get("key"), problem=True)
    job = _create_once(session, user, form.order, typed.get("key") or uuid.uuid4().hex)
    return RedirectResponse(view.url(job), status_code=303)


def _create_once(session: Db, user: CurrentUser, order: JobOrder, key: str) -> Job:
    """The key came with the form, so that a double click orders once. A form that was gone back to and changed carries
    its old key with a new order: that is meant as a new job."""
    try:
        return jobs.create(session, user, order, idempotency_key=f"form-{key[:64]}")
    except Conflict as conflict:
        if conflict.code != "idempotency_key_reused":
            raise
        return jobs.create(session, user, order)


def _order_page(
    request: Request, session: Db, user: CurrentUser, form: order_form.OrderForm, key: str | None, *, problem: bool = False
) -> Response:
    texts = {}
    if form.ready and form.order and form.dataset:
        texts = order_form.as_texts(order_form.body_of(session, form.dataset, form.order), str(request.base_url).rstrip("/"))
    known = {"model", "dataset", "validation", "strategy"} | {
        c.key for c in (*form.strategy_controls, *form.run_controls, *form.preference_controls)
    }
    elsewhere = " ".join(text for name, text in form.errors.items() if name not in known)
    said = elsewhere or "The job was not started: something below is not right yet."
    return render(
        request,
        "new_job.html",
        status_code=400 if problem else 200,
        form=form,
        key=key or uuid.uuid4().hex,
        problem=said if problem or elsewhere else None,
        texts=texts,
        ids=ids,
        offer=None if form.models else first_model.offer(session, user),
        **view.facts_of(form),
    )


# One job --------------------------------------------------------------------------------------------------------------


@pages.get("/jobs/{job_id}")
def job_page(request: Request, user: CurrentUser, session: Db, job_id: str, part: str = "") -> Response:
    """The whole page; with `?part=live` what changes in it, for the browser that has the rest."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    context = view.page(session, user, job, points=part != "live")
    if part == "live":
        return render(request, "parts/job_live.html", **context)
    return render(request, "job.html", **context)


@pages.get("/jobs/{job_id}/stream")
def job_stream(
    user: CurrentUser, session: Db, job_id: str, after: Offset = 0, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """The job's events as they happen, from after `Last-Event-ID` or `?after=`."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    return watch.EventStream(job.id, watch.after_id(last_event_id, after))


@pages.get("/jobs/{job_id}/results.csv")
def job_results(user: CurrentUser, session: Db, job_id: str) -> Response:
    """Every step's figures as CSV: the whole of what the charts thin out."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    name = f"step_metrics-{job.id.hex[:8]}.csv"
    return Response(
        jobs.results_csv(jobs.events(session, job)),
        media_type="text/csv",
        headers={"content-disposition": f'attachment; filename="{name}"'},
    )


@pages.post("/jobs/{job_id}/pause")
def pause(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    return _asked(jobs.pause(session, user, ids.parse(ids.JOB, job_id)))


@pages.post("/jobs/{job_id}/resume")
def resume(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    return _asked(jobs.resume(session, user, ids.parse(ids.JOB, job_id)))


@pages.post("/jobs/{job_id}/stop")
def stop(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    return _asked(jobs.cancel(session, user, ids.parse(ids.JOB, job_id)))


@pages.post("/jobs/{job_id}/save")
def save(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    job = jobs.save_now(session, user, ids.parse(ids.JOB, job_id))
    flash(request, f"A checkpoint is saved at the next step after step {human_number(job.step)}.")
    return _asked(job)


@pages.post("/jobs/{job_id}/again")
def again(user: CurrentUser, session: Db, job_id: str, suggestion: Annotated[int, Form_(ge=0)] = 0) -> Response:
    """The same job with the settings of one of its suggestions, as a new job."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    found = view.suggestions(session, job)
    if suggestion >= len(found):
        raise BadField("This job suggests no such settings.", way_out="Clone it, and change what you like.", param="suggestion")
    order = {**job.order, "run": {**job.order.get("run", {}), **found[suggestion].order["run"]}}
    return _asked(jobs.create(session, user, JobOrder.model_validate(order)))


@pages.post("/jobs/{job_id}/delete")
def delete(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    jobs.delete(session, user, job.id)
    flash(request, f"{job.name} was deleted.")
    return RedirectResponse("/jobs", status_code=303)


def _asked(job: Job) -> Response:
    return RedirectResponse(view.url(job), status_code=303)
