"""Requests of the API in a minute: counted for whom, refused how, and never for what does not ask the API."""

from __future__ import annotations

import time

import pytest
import redis

from app import limits, queue
from app.settings import get_settings
from app.web import request_rate
from tests.test_limits import limited
from tests.web.test_people import signed_in
from tests.web.test_projects import ada, program, team, within  # noqa: F401  # fixtures


@pytest.fixture(autouse=True)
def one_minute(session):
    """All in one minute, with limits that are read at once."""
    if time.time() % 60 > 50:
        time.sleep(60 - time.time() % 60)
    request_rate.forget()
    yield
    request_rate.forget()


def test_one_too_many_is_refused_until_the_minute_ends(api, session, user):
    assert "x-ratelimit-limit-requests" not in api.get("/v1/models").headers
    limited(session, user, requests_per_minute=3)
    request_rate.forget()
    answers = [api.get("/v1/models") for _ in range(4)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429]
    assert [answer.headers["x-ratelimit-remaining-requests"] for answer in answers] == ["2", "1", "0", "0"]
    assert {answer.headers["x-ratelimit-limit-requests"] for answer in answers} == {"3"}
    refused = answers[-1]
    error = refused.json()["error"]
    assert error["code"] == "rate_limit_exceeded" and error["message"].startswith("Your limit is reached: 3 requests in a minute."), error
    assert 0 < int(refused.headers["retry-after"]) <= 60 and refused.headers.get("x-should-retry") != "false"
    assert limits.used_by(session, "person", user.id, "requests_per_minute") == 4
    assert limits.used(session)["person"][user.id]["requests_per_minute"] == 4


def test_pages_are_neither_counted_nor_refused(api, client, session, user):
    limited(session, user, requests_per_minute=0)
    request_rate.forget()
    assert api.get("/v1/models").status_code == 429
    assert client.get("/").status_code == 200 and client.get("/healthz").status_code == 200
    assert limits.used_by(session, "person", user.id, "requests_per_minute") == 1


def test_the_limit_of_a_project_holds_for_its_people_together(web, session, user, ada, team):  # noqa: F811
    limited(session, team, requests_per_minute=2)
    request_rate.forget()
    hers, his = program(web, session, ada), program(web, session, user)
    assert [one.get("/v1/models", headers=within(team)).status_code for one in (hers, his, his)] == [200, 200, 429]
    assert his.get("/v1/models", headers=within(team)).json()["error"]["message"].startswith("The limit of this project is reached")
    assert his.get("/v1/models").status_code == 200  # in his own project


def test_the_setting_is_for_people_without_an_own_limit(web, api, session, ada, monkeypatch):  # noqa: F811
    monkeypatch.setattr(get_settings(), "limit_requests_per_minute", 1)
    limited(session, ada, requests_per_minute=2)
    request_rate.forget()
    assert [api.get("/v1/models").status_code for _ in range(2)] == [200, 429]
    hers = program(web, session, ada)
    assert [hers.get("/v1/models").status_code for _ in range(3)] == [200, 200, 429]
    assert "Requests this minute" in signed_in(web, session, ada).get("/settings/account").text


@pytest.mark.long
def test_nothing_is_refused_while_redis_is_away(api, session, user, monkeypatch):
    limited(session, user, requests_per_minute=0)
    request_rate.forget()
    assert api.get("/v1/models").status_code == 429
    away = redis.Redis(port=1, socket_connect_timeout=0.2)
    with monkeypatch.context() as patched:
        patched.setattr(queue, "get_redis", lambda: away)
        assert api.get("/v1/models").status_code == 200
        assert limits.used_by(session, "person", user.id, "requests_per_minute") == 0
