"""Valid and invalid requests to every operation of the API, as schemathesis draws them from its OpenAPI document, each sent by everybody:
a stranger, a viewer, a member with a key that may read, with a browser's session and with a full key, and an admin.

No answer may be a server error, nobody may do what their role or key does not allow, and `tests/documented.py` compares every answer
with the document: its status, its type, each field."""

from __future__ import annotations

import itertools
import random
import time
from collections import Counter
from contextlib import suppress
from typing import Any, NamedTuple

import hypothesis
import pytest
import requests
import schemathesis

from app.kit import ids
from app.schemas import openapi
from app.tables import User
from app.web import auth, policy, projects
from tests import documented
from tests.conftest import ORIGIN
from tests.factories import make_dataset, make_job
from tests.fuzz.asgi import Answer, Headers, Raw, ask
from tests.fuzz.run import HOST, MAX_SECONDS, json_shape
from tests.security.test_fuzz import SECONDS, SEED
from tests.web.test_people import made, signed_in
from tests.web.test_projects import within_team

AT_LEAST_FOR_ALL = 30.0
"""A shorter run has three of the callers send each request, drawn by the seed."""
CREDENTIALS = ("authorization", "cookie")
SENT = ("method", "url", "params", "json", "data", "files", "headers", "cookies")


class Caller(NamedTuple):
    """Who asks. `allows` are the scopes that role and key allow together; none for a stranger."""

    name: str
    headers: Headers
    allows: frozenset[policy.Scope]


def callers(web: Any, session: Any, admin: User, member: User, viewer: User, project: str) -> list[Caller]:
    """The weakest first: what a stronger one deletes, the others have asked for before."""

    def by_key(name: str, person: User, *scopes: str) -> Caller:
        _, text = auth.create_key(session, person, name, scopes)
        allows = policy.ALLOWED[person.role] & policy.granted(scopes or policy.KEY_SCOPES)
        return Caller(name, [(b"authorization", f"Bearer {text}".encode()), *in_project], allows)

    in_project: Headers = [(b"openai-project", project.encode())]
    found = [
        Caller("stranger", [], frozenset()),
        by_key("viewer", viewer),
        by_key("member with a key that reads", member, "read"),
        by_key("member", member),
        by_key("admin", admin),
    ]
    session.commit()
    browser = signed_in(web, session, member)
    cookies = "; ".join(f"{name}={value}" for name, value in browser.cookies.items())
    page = [(b"cookie", cookies.encode()), (b"origin", ORIGIN.encode()), (b"x-csrf-token", browser.headers["x-csrf-token"].encode())]
    found.insert(3, Caller("member in a browser", [*page, *in_project], policy.ALLOWED["member"]))
    return found


def raw_of(case: schemathesis.Case, caller: Caller) -> Raw:
    """The bytes of a case as this caller sends it."""
    made = case.as_transport_kwargs(base_url=ORIGIN)
    sent = requests.Request(**{name: made[name] for name in SENT if name in made}).prepare()
    body = sent.body.encode("utf-8", "surrogatepass") if isinstance(sent.body, str) else sent.body or b""
    named = [
        (name.lower().encode("latin-1", "replace"), value.encode("latin-1", "replace") if isinstance(value, str) else value)
        for name, value in sent.headers.items()
        if not caller.headers or name.lower() not in CREDENTIALS  # a stranger sends those that were drawn
    ]
    path, _, query = sent.path_url.encode().partition(b"?")
    return Raw(sent.method, path, query, [*HOST, *named, *caller.headers], body)


class Hearing:
    """What came of all requests."""

    def __init__(self) -> None:
        self.wrong: list[str] = []
        self.statuses: dict[str, Counter[int]] = {}

    def judge(self, caller: Caller, scope: str, raw: Raw, answer: Answer) -> None:
        self.statuses.setdefault(caller.name, Counter())[answer.status] += 1
        offline = answer.status == 503 and '"offline"' in answer.text
        if answer.error is not None or (answer.status >= 500 and not offline) or answer.seconds > MAX_SECONDS:
            self.wrong.append(f"{caller.name}: {raw}\n    {answer.status} in {answer.seconds:.1f} s {answer.error!r} {answer.text[:300]!r}")
        elif scope not in caller.allows and answer.status < 400:
            self.wrong.append(f"{caller.name} may not {scope}: {raw}\n    {answer.status} {answer.text[:300]!r}")
        elif 400 <= answer.status < 500 and answer.body:
            self.wrong.extend(f"{caller.name}: {raw}: {what}" for what in json_shape(answer))


@pytest.mark.long
@pytest.mark.parametrize("seconds", SECONDS)
def test_requests_made_from_the_schema(seconds, web, api, session, user, tiny_registered, data_dir):
    member, viewer = made(session, "Ada", "member"), made(session, "Vic", "viewer")
    team = projects.create(session, user, "Violins")
    projects.set_member(session, team, member, "member")
    projects.set_member(session, team, viewer, "viewer")
    session.commit()
    own = within_team(user, team)
    dataset = make_dataset(session, own, data_dir)
    known = {
        "key": ids.public(ids.DATASET, dataset.id),
        "job_id": ids.public(ids.JOB, make_job(session, own, tiny_registered, dataset).id),
        "model": "tiny",
        "file_id": ids.public(ids.FILE, dataset.file_id),
    }
    everybody = callers(web, session, user, member, viewer, ids.public(ids.PROJECT, team.id))
    scopes = {(method, path): policy.scope_of(method.upper(), route.path) for method, path, route in openapi.operations(web.app)}
    schema = schemathesis.openapi.from_dict(api.get("/v1/openapi.json").json())
    operations = [result.ok() for result in schema.get_all_operations()]
    assert len(operations) > 70
    documented.checked.clear()
    draw, deadline, heard = random.Random(SEED), time.monotonic() + seconds, Hearing()
    draw.shuffle(operations)

    def put(case: schemathesis.Case) -> None:
        if case.method != "DELETE" and draw.random() < 0.5:
            case.path_parameters = {name: known.get(name, value) for name, value in (case.path_parameters or {}).items()}
        scope = scopes[case.method.lower(), case.operation.path]
        senders = everybody if seconds > AT_LEAST_FOR_ALL else [everybody[n] for n in sorted(draw.sample(range(len(everybody)), 3))]
        for caller in senders:
            raw = raw_of(case, caller)
            heard.judge(caller, scope, raw, web.portal.call(ask, web.app, raw))

    for round in itertools.count():
        for operation in operations:
            if round and time.monotonic() > deadline:  # each operation is asked at least once
                break
            quick = hypothesis.settings(
                max_examples=1, database=None, deadline=None, suppress_health_check=list(hypothesis.HealthCheck), phases=[hypothesis.Phase.generate],
            )  # fmt: skip
            mode = schemathesis.GenerationMode.NEGATIVE if round % 2 else schemathesis.GenerationMode.POSITIVE
            test = hypothesis.given(case=operation.as_strategy(generation_mode=mode))(put)
            # An operation without parameters cannot be asked wrongly, and the bytes of an upload have no serializer.
            with suppress(hypothesis.errors.Unsatisfiable, schemathesis.core.errors.SerializationNotPossible):
                hypothesis.seed(SEED + round)(quick(test))()
        else:
            continue
        break
    print(f"\n{sum(map(Counter.total, heard.statuses.values()))} requests, {round} rounds of {len(operations)} operations, seed {SEED}")
    for name, statuses in heard.statuses.items():
        print(f"  {name}: {dict(sorted(statuses.items()))}")
    assert not heard.wrong, "\n".join(heard.wrong[:20])
    assert set(heard.statuses["stranger"]) == {401}, "a stranger learned more than that a key is needed"
    for caller in everybody[1:]:
        assert heard.statuses[caller.name][200], f"nothing was granted to {caller.name}, so nothing was tried"
