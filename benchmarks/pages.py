"""Milliseconds, bytes and accessibility of every page: `python -m benchmarks.pages --times 15`.

A real web process with the sample datasets, jobs whose lives are recorded as a worker would, a comparison, a prompt and its
run, an evaluation, votes and a conversation; nothing is trained. The pages are the routes of the application: one that is
added without an example here, and is not among those that are no pages, stops the command. Each is asked for `--times`
times, in turns, and looked at by axe in light and in dark. Exit code 1 where axe finds anything. With `--jobs 10000 --points 10000000`
the studio has so many further jobs and models with so many steps among them, with `--rows 10000` so many of each other thing that lists
show, and axe is left out. With `--api` the lists of the API are asked for too.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import shutil
import statistics
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import httpx

from app.web.renamed import MOVED
from benchmarks.crowd import fill_lists
from benchmarks.servers import free_port, python, servers, tiny_model

NO_PAGES = re.compile(
    r"/(stream|download|export|file|state|content|first-model|loaded|shell|healthz|readyz|metrics|log\.txt)$|\.(csv|yaml)$"
)
"""Routes that answer with a file, a stream, or a part of a page."""
ELSEWHERE = {
    "/sign-in",
    "/sign-in/{token}",
    "/invitation/{token}",
    "/shared/{token}",
    "/oidc/begin",
    "/oidc/callback",
    "/models/terms/{name}",
    "/playground/predictions/{prediction_id}",
    "/datasets/{key}/findings.{kind}",
    "/playground/batches/{batch_id}/{which}",
}
"""Pages that are not asked for: those of nobody, and of what is downloaded first."""


class Page(NamedTuple):
    title: str
    path: str


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=15, help="how often each page is asked for (default 15)")
    parser.add_argument("--only", default="", help="a regular expression that the route of a page must match")
    parser.add_argument("--jobs", type=int, default=0, help="further jobs that ended before (default none)")
    parser.add_argument("--points", type=int, default=0, help="steps that these recorded, all together")
    parser.add_argument("--rows", type=int, default=0, help="further datasets, evaluations, prompts and so on (default none)")
    parser.add_argument("--api", action="store_true", help="also ask the lists of the API")
    parser.add_argument("--json", type=Path, help="also write what was measured to this file")
    given = parser.parse_args()
    logging.getLogger("httpx").setLevel(logging.WARNING)
    with studio(given.jobs, given.points, given.rows) as (url, link, found):
        found = [*found, *(api_lists() if given.api else [])]
        every = [page for page in found if re.search(given.only, page.title)]
        rows = measured(url, link(), every, max(1, given.times))
        faults = {} if given.jobs or given.rows or given.api else violations(url, link(), every)
    for row in rows:
        row["violations"] = faults.get(row["page"], [])
    print(as_text(rows))
    if given.json:
        given.json.write_text(json.dumps(rows, indent=2) + "\n")
    sys.exit(1 if any(faults.values()) else 0)


@contextmanager
def studio(jobs: int = 0, points: int = 0, rows: int = 0) -> Iterator[tuple[str, Any, list[Page]]]:
    """(address, what makes a link that signs in once, pages) of a web process of its own."""
    with servers() as own:
        from app.db import transaction
        from app.web import auth
        from tests.data_worker import data_worker

        with transaction() as session:
            user = auth.first_user(session)
            samples = seed(session, user, own.folder / "data")
            if jobs:
                crowded(session, samples["/jobs/{job_id}"], jobs, points)
            if rows:
                fill_lists(session, rows)

            def link() -> str:
                made = auth.new_sign_in_link(session, user)
                session.commit()
                return made

            port = free_port()
            command = [
                "-m",
                "uvicorn",
                "app.main:create_app",
                "--factory",
                "--port",
                str(port),
                "--no-access-log",
                "--log-level",
                "warning",
            ]
            web = python(*command, log=own.folder / "web.log", LUTHIER_LOG_LEVEL="WARNING")
            try:
                with data_worker():  # rows are read by it while a page waits
                    yield f"http://127.0.0.1:{port}", link, pages(samples)
            finally:
                web.terminate()
                web.wait(20)


# What there is to see ----------------------------------------------------------------------------------------------------


def seed(session: Any, user: Any, data_dir: Path) -> dict[str, dict[str, str]]:
    """Something for every page; for each route with a name in it the names that are asked for, by what they are."""
    from app import graders, saved_graders
    from app.datasets import ingest_task, samples
    from app.distillations import service as distillations
    from app.evals import service as evals
    from app.evaluation import comparisons, predictions
    from app.evaluation import service as evaluations
    from app.inference import playground
    from app.inference.protocol import Sampling
    from app.jobs import request as job_request
    from app.jobs import service as jobs
    from app.kit import ids
    from app.learn import STOPS
    from app.models import aliases
    from app.prompts import runs as prompt_runs
    from app.prompts import service as prompts
    from app.searches import service as searches
    from app.tables import Vote
    from app.web import projects
    from tests import lives

    model = tiny_model(data_dir, session)
    data = {name: samples.add(session, user, name) for name in ("support-replies", "shop-questions", "straight-answers")}
    session.commit()
    for one in data.values():
        ingest_task.read(one.id)
        session.refresh(one)
        if one.status != "ready":
            raise SystemExit(f"{one.name} could not be read: {one.error}")
    key = {name: ids.public(ids.DATASET, one.id) for name, one in data.items()}

    def job(**more: Any) -> Any:
        made = jobs.create(session, user, job_request.read_order({"model": model.name, "dataset_id": key["support-replies"], **more}))
        session.commit()
        return lives.Life(session, made)

    def ended(life: Any) -> Any:
        return life.claim().say(lives.started(), *lives.steps(1, 120)).finish()

    queued, running, done = job(), job(), job()
    running.claim().say(lives.started(), *lives.steps(1, 74))
    ended(done)
    order = {"model": model.name, "dataset_id": key["support-replies"], "strategies": ["lora", "ia3", "full"]}
    compared = comparisons.create(session, user, comparisons.read_order(order))
    session.commit()
    for one in comparisons.jobs_of(session, compared)[:2]:
        ended(lives.Life(session, one))
    searched = searches.create(session, user, searches.read_order({name: order[name] for name in ("model", "dataset_id")}))
    prompt, version = prompts.create(session, user, "Classify", prompts.PromptBody(template="{{input}}"))
    run = prompt_runs.create(session, user, version, model.name, data["shop-questions"], prompt_runs.RunOrder(rows=5))
    score = evaluations.create(session, user, evaluations.EvaluationRequest(model=model.name, dataset_id=key["support-replies"], rows=5))
    vectors = predictions.create_vectors(session, user, model.name, key["shop-questions"])
    exchange, _ = playground.ask(session, user, [model.name], "Do you mend bows?", Sampling())
    said = [{"role": "user", "content": "Do you mend bows?"}]
    vote = Vote(owner_id=user.id, messages=said, left_model=model.name, right_model=model.name, left_text="Yes.", right_text="No.")
    session.add(vote)
    project = projects.create(session, user, "Violins")
    grader = saved_graders.create(session, user, graders.read({"type": "length", "name": "short", "max": 9}))
    aliases.set_(session, user, "support-bot", model.name)
    same = {"type": "string_check", "name": "same", "input": "{{ item.answer }}", "reference": "Yes.", "operation": "eq"}
    asked = distillations.DistillationOrder(rows=5, answers=1, allows_training=True, license="MIT")
    distilled = distillations.create(session, user, model.name, data["support-replies"], asked)
    eval_of_api = evals.create(session, user, "Short answers", {"type": "custom", "item_schema": {"type": "object"}}, [same], None)
    session.commit()
    of_jobs = {name: ids.public(ids.JOB, life.job_id) for name, life in (("queued", queued), ("running", running), ("finished", done))}
    return {
        "/datasets/{key}": key,
        "/jobs/{job_id}": of_jobs,
        "/jobs/compare": {"two jobs": "?" + "&".join(f"job={name}" for name in of_jobs.values())},
        "/aliases/{alias:path}": {"": "support-bot"},
        "/models/{key}": {"base": ids.public(ids.MODEL, model.id)},
        "/compare/{comparison_id}": {"": ids.public(ids.COMPARISON, compared.id)},
        "/searches/{search_id}": {"": ids.public(ids.SEARCH, searched.id)},
        "/evaluations/{evaluation_id}": {"": ids.public(ids.EVALUATION, score.id)},
        "/playground/vectors/{key}": {"": ids.public(ids.EVALUATION, vectors.id)},
        "/playground/prompts/{prompt_id}": {"": ids.public(ids.PROMPT, prompt.id)},
        "/playground/prompts/runs/{run_id}": {"": ids.public(ids.RUN, run.id)},
        "/distillations/{distillation_id}": {"": ids.public(ids.DISTILLATION, distilled.id)},
        "/playground/arena/{vote_id}": {"": ids.public(ids.VOTE, vote.id)},
        "/playground/{exchange_id:uuid}": {"": str(exchange.id)},
        "/settings/projects/{project_id}": {"": ids.public(ids.PROJECT, project.id)},
        "/graders/{grader_id}": {"": ids.public(ids.GRADER, grader.id)},
        "/evals/{eval_id}": {"": ids.public(ids.EVAL, eval_of_api.id)},
        "/guide/{strategy}": {"": "lora"},
        "/learn/{stop}": {name: name for name in STOPS},
    }


def crowded(session: Any, of_jobs: dict[str, str], jobs: int, points: int) -> None:
    """Many copies of the finished job; the newest of them is asked for too."""
    from app.kit import ids
    from benchmarks.crowd import fill

    began = time.monotonic()
    of_jobs["one of many"] = ids.public(ids.JOB, fill(session, ids.parse(ids.JOB, of_jobs["finished"]), jobs, points))
    print(f"{jobs:,} jobs and {points:,} points were written in {time.monotonic() - began:.0f} s.", flush=True)


def pages(samples: dict[str, dict[str, str]]) -> list[Page]:
    """Every page of the application, with its examples and its tabs."""
    from app.main import create_app
    from app.routes.models import TABS as OF_MODELS
    from app.views.job_tabs import TABS
    from app.web.navigation import each_route

    tabs = {"/jobs/{job_id}": list(TABS), "/models/{key}": list(OF_MODELS), "/datasets/{key}": ["report", "issues", "versions"]}
    found = []
    for route, one in each_route(create_app().router):
        if "GET" not in (getattr(one, "methods", None) or ()) or route.startswith("/v1") or NO_PAGES.search(route) or route in ELSEWHERE:
            continue
        if one.name == MOVED:
            continue
        if route == "/jobs/compare":
            found.append(Page(route, route + samples[route]["two jobs"]))
        elif "{" not in route:
            found.append(Page(route, route))
        else:
            found += [page for page in _with_names(route, samples) for page in _with_tabs(page, tabs.get(route, []))]
    return found


def api_lists() -> list[Page]:
    """The operations of the API that list something and need no name."""
    from app.main import create_app

    described = create_app().openapi()["paths"]
    return [Page(f"{path} (API)", path) for path, methods in described.items() if "{" not in path and _lists(methods.get("get", {}))]


def _lists(operation: dict[str, Any]) -> bool:
    return operation.get("operationId", "").startswith("list_") and operation["operationId"] != "list_hub_models"


def _with_names(route: str, samples: dict[str, dict[str, str]]) -> list[Page]:
    known = next((name for name in sorted(samples, key=len, reverse=True) if (route + "/").startswith(name + "/")), None)
    rest = route.removeprefix(known or "").replace("{line}", "2")
    if known is None or "{" in rest:
        raise SystemExit(f"No example of {route}: give it one in `seed`, or name it among those that are no pages.")
    examples = samples[known] if not rest else dict(list(samples[known].items())[:1])
    return [Page(f"{route} {what}".strip(), re.sub(r"\{.*?\}", name, known) + rest) for what, name in examples.items()]


def _with_tabs(page: Page, tabs: list[str]) -> list[Page]:
    return [Page(f"{page.title}, {tab}", f"{page.path}?tab={tab}") for tab in tabs] or [page]


# Asking -----------------------------------------------------------------------------------------------------------------


def measured(url: str, link: str, every: list[Page], times: int) -> list[dict[str, Any]]:
    """Milliseconds (median and 95th percentile) and bytes of each page. They take turns, so that a slow minute of the machine falls on all of them."""
    spent: dict[str, list[float]] = {page.title: [] for page in every}
    sizes: dict[str, int] = {}
    with httpx.Client(base_url=url, follow_redirects=True, timeout=60) as client:
        wait_for_studio(client)
        client.get(link).raise_for_status()
        for turn in range(times + 1):  # the first turn compiles the templates
            print(f"turn {turn} of {times}, {len(every)} pages", file=sys.stderr, flush=True)
            for page in every:
                began = time.perf_counter()
                answer = client.get(page.path)
                spent[page.title].append((time.perf_counter() - began) * 1000)
                kind = "application/json" if page.path.startswith("/v1") else "text/html"
                if answer.status_code != 200 or kind not in answer.headers["content-type"]:
                    raise SystemExit(f"{page.path} answers {answer.status_code} {answer.headers['content-type']}: {answer.text[:300]}")
                sizes[page.title] = len(answer.content)
    return [_row(page.title, sorted(spent[page.title][1:]), sizes[page.title]) for page in every]  # without the first turn


def _row(title: str, spent: list[float], size: int) -> dict[str, Any]:
    return {"page": title, "milliseconds": statistics.median(spent), "p95": spent[math.ceil(0.95 * len(spent)) - 1], "bytes": size}


def wait_for_studio(client: httpx.Client) -> None:
    for _ in range(300):
        try:
            client.get("/healthz").raise_for_status()
            return
        except httpx.HTTPError:
            time.sleep(0.1)
    raise SystemExit("The web process did not answer.")


def violations(url: str, link: str, every: list[Page]) -> dict[str, list[str]]:
    """What axe finds on each page, in light and in dark: the rule, the theme and the first element."""
    from axe_playwright_python.sync_playwright import Axe
    from playwright.sync_api import sync_playwright

    found: dict[str, list[str]] = {page.title: [] for page in every}
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    with sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-dev-shm-usage"])
        window = browser.new_page(viewport={"width": 1280, "height": 900})
        window.goto(url + link)
        for page in every:
            window.goto(url + page.path)
            for theme in ("light", "dark"):
                window.evaluate("theme => document.documentElement.dataset.theme = theme", theme)
                said = Axe().run(window).response["violations"]
                found[page.title] += [f"{one['id']} ({theme}): {one['nodes'][0]['html'][:120]}" for one in said]
        browser.close()
    return found


def as_text(rows: list[dict[str, Any]]) -> str:
    """A Markdown table, slowest first, and below it what axe found."""
    lines = ["| page | median ms | p95 ms | bytes | axe |", "|---|---:|---:|---:|---:|"]
    for row in sorted(rows, key=lambda row: -row["milliseconds"]):
        lines.append(f"| `{row['page']}` | {row['milliseconds']:.0f} | {row['p95']:.0f} | {row['bytes']:,} | {len(row['violations'])} |")
    return "\n".join([*lines, "", *(f"{row['page']}: {fault}" for row in rows for fault in row["violations"])]).rstrip()


if __name__ == "__main__":
    main()
