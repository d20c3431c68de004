"""Every route of the application, found by walking it: a new one that forgets the door fails here.

After MLflow CVE-2026-0545 (new routes escaped the sign-in), Ray CVE-2026-27482 (DELETE was forgotten) and
Open WebUI CVE-2026-45349 (another person's object was served).
"""

from __future__ import annotations

import re
import uuid
from collections import Counter
from collections.abc import Sequence
from typing import Any

import pytest
from starlette.testclient import TestClient

from app.kit import ids
from app.tables import User
from app.web import auth, policy
from app.web.navigation import each_route
from tests.conftest import ORIGIN, csrf_token

OPEN = {
    "/healthz",
    "/readyz",
    "/metrics",
    "/sign-in",
    "/sign-in/code",
    "/sign-in/{token}",
    "/invitation/{token}",
    "/shared/{token}",
    "/oidc/begin",
    "/oidc/callback",
    "/static",
}
"""Written out a second time on purpose: opening a door takes a change here too."""

UNSAFE = {"POST", "PUT", "PATCH", "DELETE"}
_VALUES = {
    "file": ids.FILE,
    "job": ids.JOB,
    "fine_tuning_job_id": ids.JOB,
    "dataset": ids.DATASET,
    "model": ids.MODEL,
    "checkpoint": ids.CHECKPOINT,
}


def address(path: str) -> str:
    """A path with its parameters filled in by ids of the right shape that name nothing."""

    def value(found: re.Match[str]) -> str:
        name = found.group(1).removesuffix("_id")
        return ids.public(_VALUES[name], uuid.uuid4()) if name in _VALUES and path.startswith("/v1/") else str(uuid.uuid4())

    return re.sub(r"{(\w+)(?::\w+)?}", value, path)


def every(app) -> list[tuple[str, str]]:
    found = []
    for path, route in each_route(app.router):
        for method in sorted(getattr(route, "methods", None) or {"GET"}):
            if method != "HEAD":
                found.append((method, path))
    assert len(found) > 15, "the walk found too little to mean anything"
    return found


WHOLE = [pytest.param(False, marks=pytest.mark.long, id="in turn"), pytest.param(True, marks=pytest.mark.fault, id="each with all")]
"""Whether each route is tried with one of several strangers, in turn, or with all of them."""


def tried(strangers: Sequence[Any], place: int, whole: bool) -> Sequence[Any]:
    """The strangers of the route at this place."""
    return strangers if whole else [strangers[place % len(strangers)]]


def test_the_public_list_is_the_one_written_here(web):
    assert auth.PUBLIC | {"/static"} == OPEN
    known = {path for _, path in every(web.app)}
    assert known >= auth.PUBLIC, "a public path that no route has any more"


@pytest.mark.long
def test_nothing_else_answers_without_sign_in(web):
    asker = TestClient(web.app, base_url=ORIGIN)
    for method, path in every(web.app):
        if path in OPEN:
            continue
        answer = asker.request(method, address(path), follow_redirects=False)
        if path.startswith("/v1"):
            assert answer.status_code == 401, f"{method} {path} answered {answer.status_code} to a stranger"
            assert answer.json()["error"]["code"] == "invalid_api_key"
        else:
            assert answer.status_code == 303 and answer.headers["location"].startswith("/sign-in"), f"{method} {path}: {answer.status_code}"


@pytest.mark.parametrize("whole", WHOLE)
def test_a_made_up_key_or_cookie_opens_nothing(web, whole):
    fakes = (
        {"authorization": f"Bearer sk-luthier-{'0' * 32}-x"},
        {"authorization": "Basic b3duZXI6eA=="},
        {"cookie": f"luthier_{auth.studio_mark()}=guess"},
    )
    askers = [TestClient(web.app, base_url=ORIGIN, headers=headers) for headers in fakes]
    for place, (method, path) in enumerate(every(web.app)):
        if path not in OPEN:
            for asker in tried(askers, place, whole):
                status = asker.request(method, address(path), follow_redirects=False).status_code
                assert status in (401, 303), f"{method} {path} with {asker.headers}: {status}"


@pytest.mark.parametrize("whole", WHOLE)
def test_a_page_of_another_site_changes_nothing(client, api, whole):
    """For every method but the reading ones, with a cookie and with a key."""
    strangers = ("http://evil.example", "null", "http://127.0.0.1:9999", "https://127.0.0.1:8000", "http://127.0.0.1:8000.evil.example", "")
    for asker in (client, api):
        for place, (method, path) in enumerate(every(client.app)):
            if method in UNSAFE:
                for origin in tried(strangers, place, whole):
                    answer = asker.request(method, address(path), headers={"origin": origin}, follow_redirects=False)
                    assert answer.status_code == 403, f"{method} {path} from {origin!r}: {answer.status_code}"
    for site in ("cross-site", "same-site"):
        assert client.post("/theme", data={"theme": "dark"}, headers={"sec-fetch-site": site}).status_code == 403


@pytest.mark.parametrize("whole", WHOLE)
def test_a_cookie_alone_changes_nothing(client, whole):
    """Without the token, with a token of another session and with a broken one, whatever the method."""
    tokens = ({}, {"x-csrf-token": "0" * 16 + "." + "0" * 64}, {"x-csrf-token": "x"}, {"x-csrf-token": "."})
    del client.headers["x-csrf-token"]
    for place, (method, path) in enumerate(every(client.app)):
        if method in UNSAFE and path not in OPEN:
            for headers in tried(tokens, place, whole):
                answer = client.request(method, address(path), headers=headers, follow_redirects=False)
                assert answer.status_code == 403, f"{method} {path} with {headers}: {answer.status_code}"


def test_a_token_belongs_to_one_session(client, session, user):
    other = TestClient(client.app, base_url=ORIGIN, headers={"origin": ORIGIN, "x-csrf-token": client.headers["x-csrf-token"]})
    link = auth.new_sign_in_link(session, user)
    session.commit()
    other.get(link)
    assert client.post("/theme", data={"theme": "dark"}, follow_redirects=False).status_code == 303
    assert other.post("/theme", data={"theme": "dark"}, follow_redirects=False).status_code == 403


def test_the_token_in_a_plain_form_is_enough(client):
    token = client.headers.pop("x-csrf-token")
    assert client.post("/theme", data={"theme": "dark", "csrf_token": token}, follow_redirects=False).status_code == 303


def test_every_answer_has_the_headers(client):
    asked = [
        ("GET", path) for path in ("/", "/settings", "/nothing", "/healthz", "/v1/studio", "/v1/nothing", "/sign-in", "/static/luthier.css")
    ]
    for method, path in [*asked, ("DELETE", "/"), ("POST", "/v1/studio")]:
        headers = client.request(method, path, follow_redirects=False).headers
        policy = headers["content-security-policy"]
        assert "unsafe" not in policy and "*" not in policy and "http:" not in policy
        for part in (
            "default-src 'self'",
            "script-src 'self'",
            "style-src 'self'",
            "object-src 'none'",
            "base-uri 'none'",
            "frame-ancestors 'none'",
        ):
            assert part in policy
        assert headers["x-content-type-options"] == "nosniff" and headers["x-request-id"]
        assert not [name for name in headers if name.startswith("access-control-")], f"{path} opens itself to other sites"


def test_preflights_are_not_answered(client):
    headers = {"origin": "http://evil.example", "access-control-request-method": "POST"}
    for _, path in every(client.app)[:10]:
        answer = client.options(address(path), headers=headers)
        assert answer.status_code >= 400 and "access-control-allow-origin" not in answer.headers


@pytest.mark.parametrize("host", ["evil.example", "127.0.0.1.evil.example", "localhost.evil.example:8000", "", "a@127.0.0.1@b", "[::1"])
def test_a_foreign_host_name_is_refused(web, host):
    for path in ("/", "/healthz", "/v1/models", "/static/luthier.css"):
        assert web.get(path, headers={"host": host}, follow_redirects=False).status_code == 400


def test_names_of_this_machine_are_known(web):
    for host in ("127.0.0.1:8000", "localhost", "localhost:1234", "[::1]:8000", "192.168.1.7:8000"):
        assert web.get("/healthz", headers={"host": host}).status_code == 200, host


TUS = {"tus-resumable": "1.0.0", "content-type": "application/offset+octet-stream", "upload-offset": "0"}
"""What a resumable upload must say before anybody looks for it."""


@pytest.mark.long
def test_an_object_that_is_not_there_is_a_404(api, client):
    """The scaffold of the ownership sweep: an id of the right shape that is not ours must look the same as none at all."""
    for method, path in every(api.app):
        if "{" in path and path not in OPEN:
            asker = api if path.startswith("/v1") else client
            answer = asker.request(method, address(path), headers=TUS, follow_redirects=False)
            if answer.status_code == 308:  # an address of the version before
                answer = asker.request(method, answer.headers["location"], headers=TUS, follow_redirects=False)
            assert answer.status_code in (400, 404), f"{method} {path}: {answer.status_code} for an id that names nothing"


def test_every_operation_has_its_scope(web):
    """A new route fails here until `app/web/policy.py` says who may call it; one that is gone has no line there."""
    routed = {(method, path) for method, path in every(web.app) if path not in OPEN}
    assert routed - set(policy.scopes()) - HEADS == set(), "no scope"
    assert set(policy.scopes()) - routed == HEADS, "no such route"
    assert not [key for key, scope in policy.scopes().items() if scope == "read" and key[0] in UNSAFE]


HEADS = {("HEAD", "/v1/tus/{key}")}
"""`every` walks no HEAD: this one has no GET beside it."""


@pytest.fixture
def people(web, session, user):
    """A browser of one person of each role."""
    found = {}
    for role in policy.ROLES:
        person = User(name=f"a {role}", role=role)
        session.add(person)
        session.flush()
        link = auth.new_sign_in_link(session, person)
        session.commit()
        found[role] = browser = TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN})
        browser.headers["x-csrf-token"] = csrf_token(browser.get(link).text)
    return found


@pytest.mark.long
def test_a_role_is_refused_what_it_does_not_allow_and_nothing_else(people, web):
    """Every route × every role: 403 with the reason where the table says so, and never elsewhere."""
    ends_the_session = {"/sign-out", "/settings/account/sign-out-everywhere"}
    counts = Counter()
    for role, browser in people.items():
        for method, path in every(web.app):
            if path in OPEN or path in ends_the_session:
                continue
            answer = browser.request(method, address(path), headers=TUS, follow_redirects=False)
            allowed = policy.scope_of(method, path) in policy.ALLOWED[role]
            counts[role, allowed] += 1
            refused = answer.status_code == 403 and "your role is" in answer.text
            assert refused != allowed, f"{method} {path} as {role}: {answer.status_code}"
            if method in UNSAFE and role == "viewer" and policy.scope_of(method, path) not in ("session", "account"):
                assert answer.status_code == 403, f"{method} {path}: a viewer changes something"
    assert not counts["admin", False] and counts["viewer", False] > 130 and counts["member", False] >= 10, counts


@pytest.mark.long
@pytest.mark.parametrize("scope", list(policy.KEY_SCOPES))
def test_a_key_does_what_its_scopes_allow_and_nothing_else(web, session, user, scope):
    _, text = auth.create_key(session, user, "a program", [scope])
    session.commit()
    asker = TestClient(web.app, base_url=ORIGIN, headers={"authorization": f"Bearer {text}", "origin": ORIGIN})
    for method, path in every(web.app):
        if path not in OPEN:
            answer = asker.request(method, address(path), headers=TUS, follow_redirects=False)
            refused = (answer.status_code == 403 and "insufficient_permissions" in answer.text) or "API key may" in answer.text
            assert refused != (policy.scope_of(method, path) in policy.KEY_SCOPES[scope]), f"{method} {path}: {answer.status_code}"
