"""Two people × every object × every method: a stranger finds nothing (404), who may only look is refused every change (403).

The requests are the valid ones of `tests/fuzz/samples.py`, on a studio with one of everything, so that a new route is asked too.
"""

from __future__ import annotations

import asyncio
import re
import shutil
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest

from app.inference import client
from app.kit import ids, manifest
from app.tables import User
from app.web import auth, policy, projects
from tests.conftest import csrf_token
from tests.fuzz.asgi import Answer, Headers, ask
from tests.fuzz.mutate import raw
from tests.fuzz.run import Case, Fuzz
from tests.fuzz.world import World
from tests.generating import register_tiny
from tests.web.test_people import made, signed_in

NOT_OF_A_PROJECT = {"person", "invitation", "session", "key", "own_project", "project", "member", "link", "name"}
SHARED = {"model", "model_name"}
"""The base model of the world is shared by everyone."""

TELLS_ON_THE_NEXT_PAGE = "POST /{place}/bulk"
"""It answers 303 and says there what was refused; what it must not do is looked at."""
ASKS_THE_DATA_WORKER = "GET /datasets/{key}/rows/{line}"
"""No data worker runs here, so this page waits for it in vain, whoever asks."""


@pytest.fixture
def team(session, user) -> Any:
    return projects.create(session, user, "Violins")


@pytest.fixture
def world(session, user, team, data_dir, tiny_model) -> World:
    """One of everything, in the project."""
    shutil.copytree(tiny_model, data_dir / "models" / "tiny")
    base = register_tiny(session)
    base.revision = manifest.write(data_dir / "models" / "tiny")["revision"]
    session.commit()
    return World(session, User(id=user.id, name=user.name, role=user.role).work_in(team.id), data_dir, base, tiny_model)


@pytest.fixture(autouse=True)
def no_generate_worker(monkeypatch) -> None:
    """None runs here, so nothing is gained by waiting for one."""
    monkeypatch.setattr(client, "NO_WORKER_SECONDS", 0.5)


def ways_in(web, session, person: User, project: Any = None) -> tuple[Headers, Headers]:
    """Headers of a program and of a browser of this person, which work in `project`."""
    _, text = auth.create_key(session, person, "a program")
    asker = signed_in(web, session, person)
    if project is not None:
        assert asker.post("/project", data={"project": ids.public(ids.PROJECT, project.id)}, follow_redirects=False).status_code == 303
    token = csrf_token(asker.get("/").text)
    cookies = "; ".join(f"{name}={value}" for name, value in asker.cookies.items())
    api = [(b"authorization", f"Bearer {text}".encode())]
    if project is not None:
        api.append((b"openai-project", ids.public(ids.PROJECT, project.id).encode()))
    return api, [(b"cookie", cookies.encode()), (b"x-csrf-token", token.encode()), (b"origin", b"http://127.0.0.1:8000")]


def answers(fuzz: Fuzz) -> Iterator[tuple[Case, str, Answer]]:
    """Each request with its scope and answer, but for those that end the session or open a door. One event loop serves all, as in
    a server: streams share a listener that lives in it."""
    with asyncio.Runner() as loop:
        for case in fuzz.cases:
            method, _, path = case.name.partition(" ")
            if path not in auth.PUBLIC and policy.scope_of(method, path) not in ("session", "account", "admin"):
                parts = fuzz.parts(case)
                yield case, policy.scope_of(method, path), loop.run(ask(fuzz.app, raw(parts, fuzz.door(case))))


def objects(case: Case) -> set[str]:
    """Kinds of the objects that the path names."""
    return {found for value in case.sample.params.values() for found in re.findall(r"[$+](\w+)", value)} - NOT_OF_A_PROJECT


def named_anywhere(case: Case) -> set[str]:
    found = re.findall(r"[$+](\w+)", repr((case.sample.params, case.sample.query, case.sample.json, case.sample.form)))
    return set(found) - NOT_OF_A_PROJECT - SHARED


@pytest.mark.long
@pytest.mark.timeout(300)
def test_a_stranger_finds_nothing_of_a_project_he_is_not_in(web, session, team, world):
    """404, as for an id that names nothing: never 200, and never a 403, which would tell that something is there."""
    fuzz = Fuzz(web.app, world, *ways_in(web, session, made(session, "Bo", "member")), 7)
    counts: Counter[str] = Counter()
    wrong = []
    for case, _, answer in answers(fuzz):
        kinds = objects(case) - SHARED
        if kinds:
            counts[case.name.partition(" ")[0]] += 1
            hidden = answer.status in (404, 308) or (answer.status == 503 and '"offline"' in answer.text)  # before anything is looked up
            wrong += [] if hidden else [f"{case.name}: {answer.status} {answer.text[:200]}"]
        elif case.name.partition(" ")[0] == "POST" and named_anywhere(case) and case.name != TELLS_ON_THE_NEXT_PAGE:
            counts["in a body"] += 1
            wrong += [] if answer.status >= 400 else [f"{case.name}: {answer.status} {answer.text[:200]}"]
    assert not wrong, "\n".join(wrong)
    session.refresh(world.dataset)
    assert world.dataset.tags == [], "nothing was tagged by a selection of others' rows"
    assert counts["GET"] >= 44 and counts["POST"] >= 51 and counts["DELETE"] >= 9 and counts["PATCH"] >= 4, counts


@pytest.mark.long
@pytest.mark.timeout(300)
def test_who_may_only_look_sees_everything_and_changes_nothing(web, session, team, world):
    ada = made(session, "Ada", "member")
    projects.set_member(session, team, ada, "viewer")
    session.commit()
    fuzz = Fuzz(web.app, world, *ways_in(web, session, ada, team), 7)
    counts: Counter[str] = Counter()
    wrong = []
    for case, scope, answer in answers(fuzz):
        counts[scope] += 1
        if case.name == ASKS_THE_DATA_WORKER:
            continue
        if scope == "read":
            right = answer.status in case.sample.expect
        else:
            right = answer.status == 403 and "your role in it is viewer" in answer.text
        wrong += [] if right else [f"{case.name}: {answer.status} {answer.text[:200]}"]
    assert not wrong, "\n".join(wrong)
    assert counts["read"] >= 90 and counts["write"] >= 120 and counts["generate"] >= 5, counts
