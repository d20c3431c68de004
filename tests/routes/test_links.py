"""Every address a page names is asked for: a link that leads nowhere fails here, whichever page it stands on."""

from __future__ import annotations

import re
from html.parser import HTMLParser
from urllib.parse import parse_qsl, urljoin, urlsplit

import pytest
from sqlalchemy import select

from app.inference import playground
from app.inference.playground import AnswerFold
from app.inference.protocol import AnswerStarted, Done, Sampling, TextPart
from app.jobs import checkpoints
from app.kit import ids, manifest
from app.prompts import service as prompts
from app.tables import Checkpoint, Model
from tests.factories import make_job, upload
from tests.lives import Life, started, steps
from tests.routes.test_comparisons import body, create
from tests.views.test_evaluation_looks import record, scores

NAMED = re.compile(r"(?<=/)(ds|ftjob|model|eval|cmp|prompt|run|vote)-[0-9a-f]{32}|[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?<=/rows/)\d+")
AWAY = re.compile("/models/terms/")
"""Pages whose words stand on another server, which the tests are kept from; they say so with a 503."""
MAX_ALIKE = 3
"""Pages of one kind, of one tab, that are asked for with the same names in the query: the third row of a dataset is like the second."""


class Links(HTMLParser):
    """What a page leads to: addresses a person can follow and those its scripts ask for. Forms that post are not followed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: set[str] = set()
        self.names: set[str] = set()
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.found |= {value for name in ("href", "src", "hx-get") if (value := given.get(name))}
        self.names |= {value for name in ("id", "name") if (value := given.get(name))}
        if tag == "form" and (given.get("method") or "get") == "get" and given.get("action"):
            self.found.add(given["action"])


@pytest.fixture
def full(session, user, tiny_registered, data_dir) -> None:
    """A studio with at least one of everything that has a page."""
    rows = [{"prompt": f"{n}?", "completion": f"Yes, {n}. " * 9} for n in range(60)]
    dataset = upload(session, user, rows, "chats.jsonl")
    life = Life(session, make_job(session, user, tiny_registered, dataset)).claim()
    life.say(started(24), *steps(1, 24, 24)).finish(24)
    make_job(session, user, tiny_registered, dataset)
    tuned = session.scalars(select(Model).where(Model.job_id == life.job_id)).one()
    (data_dir / tuned.path).mkdir(parents=True)
    (data_dir / tuned.path / "adapter_config.json").write_text("{}")
    tuned.revision = manifest.write(data_dir / tuned.path)["revision"]
    for saved in session.scalars(select(Checkpoint).where(Checkpoint.job_id == life.job_id)):
        (data_dir / saved.path / checkpoints.WEIGHTS).mkdir(parents=True)
        (data_dir / saved.path / checkpoints.WEIGHTS / "adapter_config.json").write_text("{}")
        manifest.write(data_dir / saved.path)
        saved.manifest_sha256 = manifest.sha256_of(data_dir / saved.path / manifest.NAME)
    create(session, user, body(dataset, "lora", "ia3"))
    record(session, user, tuned, dataset, result=scores(), progress=1.0)
    prompts.create(session, user, "Say it", prompts.read_body({}))
    exchange, asked = playground.ask(session, user, [tuned.name], "What wood?", Sampling())
    said = [
        AnswerStarted(rendered_prompt="What wood?", prompt_tokens=3, max_tokens=8, context=64),
        TextPart(index=0, text="Spruce.", tokens=3),
    ]
    heard = AnswerFold()
    heard.take([*said, Done(prompt_tokens=3, completion_tokens=2, first_token_seconds=0.1, tokens_per_second=20.0)])
    playground.record(session, exchange.id, asked[0], heard)
    session.commit()


def kind_of(address: str) -> str:
    parts = urlsplit(address)
    return (
        NAMED.sub(lambda name: f"{name[1]}-*" if name[1] else "*", parts.path)
        + "?"
        + ",".join(sorted({f"{name}={value}" if name == "tab" else name for name, value in parse_qsl(parts.query)}))
    )


def crawl(client) -> tuple[dict[str, str], list[str]]:
    """Every address that was asked for from the overview on with the page that named it first; and what leads nowhere."""
    waiting, seen, alike, dead = {"/": "the beginning"}, {}, {}, []
    while waiting:
        address, page = waiting.popitem()
        seen[address] = page
        kind = kind_of(address)
        alike[kind] = alike.get(kind, 0) + 1
        if alike[kind] > MAX_ALIKE:
            continue
        answer = client.get(address, follow_redirects=False)
        away = answer.status_code == 503 and AWAY.match(address)
        if answer.status_code >= 400 and not away:
            dead.append(f"{page} leads to {address}, which answers {answer.status_code}")
        if answer.status_code == 308:
            dead.append(f"{page} leads to {address}, which is called {answer.headers['location']} now")
        found = [urljoin(address, answer.headers["location"])] if answer.status_code in (302, 303, 307) else []
        if answer.headers.get("content-type", "").startswith("text/html"):
            links = Links(answer.text)
            here = {name[1:] for name in links.found if name.startswith("#") and len(name) > 1}
            dead += [f"{address} leads to #{name} on itself, which is not there" for name in here - links.names]
            found += [urljoin(address, link).partition("#")[0] for link in links.found]
        for link in found:
            if link.startswith("/") and link not in seen:
                waiting.setdefault(link, address)
    return seen, dead


@pytest.mark.long
def test_no_link_of_any_page_leads_nowhere(client, full, session):
    asked, dead = crawl(client)
    assert not dead, "\n".join(dead)
    kinds = {kind_of(address).partition("?")[0] for address in asked}
    wanted = {
        "/",
        "/datasets",
        "/models",
        "/jobs",
        "/compare",
        "/playground",
        "/playground/prompts",
        "/playground/arena",
        "/guide",
        "/settings",
    }
    details = {"/datasets/ds-*", "/datasets/ds-*/rows", "/models/model-*", "/jobs/ftjob-*", "/compare/cmp-*", "/evaluations/eval-*"}
    assert wanted | details | {"/playground/*", "/playground/prompts/prompt-*", "/guide/lora", "/jobs/new", "/jobs/advice"} <= kinds
    model = session.scalars(select(Model).where(Model.job_id.is_not(None))).one()
    assert f"/models/{ids.public(ids.MODEL, model.id)}" in asked
