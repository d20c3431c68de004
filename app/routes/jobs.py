"""Pages of jobs: the list, the form, one job live, and its actions. The JSON API is in `app/routes/fine_tuning.py`; both call
`app.jobs.service`."""

from __future__ import annotations

import uuid
from typing import Annotated, Literal
from urllib.parse import urlencode

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi import Form as Form_
from fastapi.responses import RedirectResponse, Response, StreamingResponse
from starlette.datastructures import UploadFile

from app.db import Db
from app.errors import BadData, BadField
from app.jobs import artifacts as job_artifacts
from app.jobs import checkpoints, config_file, metrics_csv, progress_cache
from app.jobs import service as jobs
from app.jobs.request import JobRequest
from app.kit import ids, zip_stream
from app.kit.humanize import human_number
from app.languages import gettext, mark
from app.models import first_model, model_card
from app.models import service as models
from app.planning.schedule import GOVERNED
from app.tables import Job, Model
from app.views import job as view
from app.views import job_form, job_tabs, lists, run_comparison
from app.web import event_stream
from app.web.auth import CurrentUser
from app.web.navigation import MenuPage
from app.web.order_forms import Posted, once
from app.web.pagination import MAX_NUMBER, Offset, Step
from app.web.templates import flash, render

pages = APIRouter()
MENU = (MenuPage(mark("Runs"), "/jobs", "training", 10), MenuPage(mark("New run"), "/jobs/new", "training", 20))


def _form(items: Posted) -> dict[str, str]:
    """Of a repeated field the last value counts: a checkbox overrules the hidden field before it."""
    return dict(items)


Form = Annotated[dict[str, str], Depends(_form)]


@pages.get("/jobs")
def job_list(request: Request, user: CurrentUser, session: Db, wish: Annotated[lists.ListQuery, Query()]) -> Response:
    bar = lists.jobs_bar(session, user, wish)
    found = session.scalars(lists.jobs(jobs.mine(user), bar).limit(wish.shown + 1)).all()
    shown, bar.more = list(found[: wish.shown]), len(found) > wish.shown
    return render(
        request,
        "jobs.html",
        bar=bar,
        rows=view.rows(session, shown, progress_cache.best_losses(session, shown)),
        summary=view.summary(shown),
        moving=any(job.status in ("queued", "running") for job in shown),
    )


@pages.get("/jobs/compare")
def compare_runs(
    request: Request, user: CurrentUser, session: Db, job: Annotated[list[str] | None, Query()] = None, part: str = ""
) -> Response:
    """Up to eight jobs compared: scores, settings that differ, and curves; with `?part=live` the part that changes while they
    run."""
    context = run_comparison.page(session, user, job or [])
    return render(request, "parts/compare_runs_live.html" if part == "live" else "compare_runs.html", **context)


# Ordering -------------------------------------------------------------------------------------------------------------


@pages.get("/jobs/new")
def new_job(request: Request, user: CurrentUser, session: Db) -> Response:
    """The form, filled from the query string: `?dataset=&model=`, all fields typed so far, or `?clone=ftjob-…`."""
    typed = dict(request.query_params.multi_items())
    if clone := typed.pop("clone", ""):
        typed = config_file.typed_of(session, user, clone) | typed
    return _order_page(request, session, user, job_form.order_form(session, user, typed), typed.get("key"))


@pages.get("/jobs/new/file")
def job_file_of_form(request: Request, user: CurrentUser, session: Db) -> Response:
    """The configuration of the job that the form would start, with every setting, as a file for `luthier train`."""
    form = job_form.order_form(session, user, dict(request.query_params.multi_items()))
    if form.unseen or form.spec is None or not form.ready:
        said = form.unseen or gettext("There is no file of it: something below is not right yet.")
        return _order_page(request, session, user, form, None, problem=said, status_code=409 if form.unseen else 400)
    return _yaml_file(config_file.as_file(form.spec), "job.yaml")


async def _file(request: Request) -> bytes:
    """The configuration file of a posted form. Raises BadField for one that is too large, or BadData."""
    length = request.headers.get("content-length", "")
    if not length.isdigit() or int(length) > config_file.MAX_FILE:
        hint = gettext("It may have %(most)s bytes.", most=human_number(config_file.MAX_FILE))
        raise BadData(gettext("The file is too large for the settings of a run."), hint=hint)
    sent = (await request.form(max_files=1)).get("file")
    if not isinstance(sent, UploadFile) or not sent.filename:
        raise BadField(gettext("No file was chosen."), hint=gettext("Choose the YAML file of a run."), param="file")
    return await sent.read()


@pages.post("/jobs/new/file")
def load_job_file(user: CurrentUser, session: Db, sent: Annotated[bytes, Depends(_file)]) -> Response:
    """The form, filled from a configuration file."""
    return RedirectResponse(f"/jobs/new?{urlencode(config_file.read(session, user, sent))}", status_code=303)


@pages.get("/jobs/{job_id}/job.yaml")
def job_file(user: CurrentUser, session: Db, job_id: str) -> Response:
    """The complete configuration of a job, as a file for `luthier train`."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    return _yaml_file(config_file.of_job(job), f"job-{job.id.hex[:8]}.yaml")


def _yaml_file(text: str, name: str) -> Response:
    return Response(text, media_type="application/yaml", headers={"content-disposition": f'attachment; filename="{name}"'})


@pages.post("/jobs")
def order_job(request: Request, user: CurrentUser, session: Db, typed: Form) -> Response:
    form = job_form.order_form(session, user, typed)
    if form.unseen:
        return _order_page(request, session, user, form, typed.get("key"), problem=form.unseen, status_code=409)
    if not form.ready or form.order is None:
        said = gettext("The run was not started: something below is not right yet.")
        return _order_page(request, session, user, form, typed.get("key"), problem=said, status_code=400)
    order = form.order
    job = once(lambda key: jobs.create(session, user, order, idempotency_key=key), typed.get("key") or uuid.uuid4().hex)
    return RedirectResponse(view.url(job), status_code=303)


def _order_page(
    request: Request,
    session: Db,
    user: CurrentUser,
    form: job_form.OrderForm,
    key: str | None,
    *,
    problem: str | None = None,
    status_code: int = 200,
) -> Response:
    texts = {}
    if form.ready and form.order and form.dataset:
        texts = config_file.as_texts(config_file.body_of(session, form.dataset, form.order), str(request.base_url).rstrip("/"))
    answer = render(
        request,
        "new_job.html",
        status_code=status_code,
        form=form,
        key=key or uuid.uuid4().hex,
        problem=problem,
        governed=[f"run.{name}" for name in GOVERNED],
        texts=texts,
        ids=ids,
        offer=None if form.models else first_model.offer(session, user),
        **view.facts_of(form),
    )
    if "hx-request" in request.headers:  # an estimate: the URL follows the form, so that Back and reload show the same
        answer.headers["hx-replace-url"] = form.address
    return answer


# One job --------------------------------------------------------------------------------------------------------------


Tab = Literal["overview", "metrics", "samples", "evaluation", "data", "config"]


def _wish(
    prompt: Annotated[int, Query(ge=0, le=1000)] = 0,
    step: Annotated[int | None, Query(ge=0, le=MAX_NUMBER)] = None,
    filter: Annotated[str, Query(max_length=200)] = "",
    level: Literal["", "info", "warn", "error"] = "",
) -> job_tabs.Wish:
    return job_tabs.Wish(prompt, step, filter.strip(), level)


@pages.get("/jobs/{job_id}")
def job_page(
    request: Request,
    user: CurrentUser,
    session: Db,
    job_id: str,
    wish: Annotated[job_tabs.Wish, Depends(_wish)],
    tab: Tab = "overview",
    part: str = "",
) -> Response:
    """The page with one of its tabs; with `?part=live` the part that changes, for a page that is loaded already."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    context = job_tabs.page(session, user, job, tab, wish, points=part != "live")
    return render(request, "parts/job_live.html" if part == "live" else "job.html", **context)


@pages.get("/jobs/{job_id}/log.txt")
def job_log(user: CurrentUser, session: Db, job_id: str) -> Response:
    """The complete log: the events of the job, and the output of its trainers."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    return StreamingResponse(job_artifacts.log(session, job), media_type="text/plain", headers=_attached(f"job-{job.id.hex[:8]}.log"))


def _attached(name: str) -> dict[str, str]:
    return {"content-disposition": f'attachment; filename="{name}"', "x-content-type-options": "nosniff"}


@pages.get("/jobs/{job_id}/stream")
def job_stream(
    user: CurrentUser, session: Db, job_id: str, after: Offset = 0, last_event_id: Annotated[str | None, Header()] = None
) -> Response:
    """Server-sent events of the job, starting after `Last-Event-ID` or `?after=`."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    return event_stream.EventStream(job.id, event_stream.after_id(last_event_id, after))


@pages.get("/jobs/{job_id}/results.csv")
def job_results(user: CurrentUser, session: Db, job_id: str) -> Response:
    """Metrics of every step as CSV; the charts show a subset of the points."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    figures = metrics_csv.results_csv(jobs.events(session, job))
    return Response(figures, media_type="text/csv", headers=_attached(f"step_metrics-{job.id.hex[:8]}.csv"))


@pages.post("/jobs/{job_id}/pause")
def pause(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    return _asked(jobs.pause(session, user, ids.parse(ids.JOB, job_id)))


@pages.post("/jobs/{job_id}/resume")
def resume(user: CurrentUser, session: Db, job_id: str, step: Annotated[int | None, Form_(ge=0, le=MAX_NUMBER)] = None) -> Response:
    return _asked(checkpoints.resume(session, user, ids.parse(ids.JOB, job_id), step))


@pages.post("/jobs/{job_id}/checkpoints/{step}/keep")
def keep(request: Request, user: CurrentUser, session: Db, job_id: str, step: Step) -> Response:
    model = checkpoints.keep(session, jobs.get(session, user, ids.parse(ids.JOB, job_id)), step)
    flash(request, gettext("The checkpoint of step %(step)s is kept as the model %(model)s.", step=human_number(step), model=model.name))
    return RedirectResponse(f"/models/{ids.public(ids.MODEL, model.id)}", status_code=303)


@pages.get("/jobs/{job_id}/checkpoints/{step}/download")
def download(user: CurrentUser, session: Db, job_id: str, step: Step) -> Response:
    """A checkpoint's weights as a zip, in the layout of a model's download."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    row = checkpoints.get(session, job, step)
    folder, model = checkpoints.folder_of(row), checkpoints.model_of(session, job, row)
    made_of, chain = models.made_of(session, model), [*models.lineage(session, session.get_one(Model, job.model_id)), model]
    stream = zip_stream.zip_of(folder / checkpoints.WEIGHTS, model_card.card(model, chain, job, made_of), made_of.base)
    return StreamingResponse(stream, media_type="application/zip", headers=_attached(f"job-{job.id.hex[:8]}-step-{step}.zip"))


@pages.post("/jobs/{job_id}/stop")
def stop(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    return _asked(jobs.cancel(session, user, ids.parse(ids.JOB, job_id)))


@pages.post("/jobs/{job_id}/save")
def save(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    job = jobs.save_now(session, user, ids.parse(ids.JOB, job_id))
    flash(request, gettext("A checkpoint is saved at the next step after step %(step)s.", step=human_number(job.step)))
    return _asked(job)


@pages.post("/jobs/{job_id}/retry")
def retry(user: CurrentUser, session: Db, job_id: str, suggestion: Annotated[int, Form_(ge=0)] = 0) -> Response:
    """A new job with the same settings, changed as one of its suggestions says."""
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    found = job_tabs.suggestions(session, job)
    if suggestion >= len(found):
        message = gettext("This run suggests no such settings.")
        raise BadField(message, hint=gettext("Clone it, and change what you like."), param="suggestion")
    order = {**job.order, "run": {**job.order.get("run", {}), **found[suggestion].order["run"]}}
    return _asked(jobs.create(session, user, JobRequest.model_validate(order)))


@pages.post("/jobs/{job_id}/delete")
def delete(request: Request, user: CurrentUser, session: Db, job_id: str) -> Response:
    job = jobs.get(session, user, ids.parse(ids.JOB, job_id))
    jobs.delete(session, user, job.id)
    flash(request, gettext("%(name)s was deleted.", name=job.name))
    return RedirectResponse("/jobs", status_code=303)


def _asked(job: Job) -> Response:
    return RedirectResponse(view.url(job), status_code=303)
