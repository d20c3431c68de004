"""API keys: scopes, their end, and what a role leaves of them."""

from __future__ import annotations

import re
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from app.errors import BadField, Forbidden
from app.tables import ApiKey, User
from app.web import auth, people
from tests.conftest import ORIGIN


def program(web, text: str) -> TestClient:
    return TestClient(web.app, base_url=ORIGIN, headers={"authorization": f"Bearer {text}"})


def key_of(session, user: User, *scopes: str, days: float | None = None) -> tuple[ApiKey, str]:
    made = auth.create_key(session, user, "a program", scopes, days)
    session.commit()
    return made


def test_a_key_reads_and_is_told_why_it_does_no_more(web, session, user):
    asker = program(web, key_of(session, user, "read")[1])
    assert asker.get("/v1/files").status_code == 200
    refused = asker.post("/v1/files", files={"file": ("a.jsonl", b"{}\n")}, data={"purpose": "user_data"})
    assert refused.status_code == 403 and refused.json()["error"]["code"] == "insufficient_permissions"
    assert "its scopes are read, and write is needed" in refused.json()["error"]["message"]
    asker = program(web, key_of(session, user, "generate")[1])
    assert asker.get("/v1/files").status_code == 403
    assert asker.post("/v1/chat/completions", json={"model": "none", "messages": [{"role": "user", "content": "a"}]}).status_code == 404
    assert program(web, key_of(session, user, "write")[1]).get("/v1/organization/users").status_code == 403


@pytest.mark.parametrize("path", ["/settings", "/settings/account"])
def test_no_key_reaches_the_account_itself(api, path):
    refused = api.get(path)
    assert refused.status_code == 403 and "No API key may do this" in refused.text
    assert api.post("/settings/keys", data={"name": "another"}, headers={"origin": ORIGIN}).status_code == 403


def test_a_person_of_less_has_keys_of_less(web, session, user):
    ada = User(name="Ada", role="admin")
    session.add(ada)
    session.flush()
    asker = program(web, key_of(session, ada)[1])
    assert asker.get("/v1/organization/users").status_code == 200
    people.set_role(session, ada, "viewer")
    session.commit()
    assert asker.get("/v1/organization/users").status_code == 403 and asker.get("/v1/files").status_code == 200
    assert key_of(session, ada)[0].scopes == ["read"]
    with pytest.raises(Forbidden, match="viewer"):
        auth.create_key(session, ada, "more", ["write"])
    with pytest.raises(BadField):
        auth.create_key(session, ada, "other", ["everything"])


def test_scopes_that_another_one_holds_are_not_kept(session, user):
    for asked, kept in (
        ((), ["admin"]),
        (("read", "generate"), ["read", "generate"]),
        (("read", "write"), ["write"]),
        (("admin", "read"), ["admin"]),
    ):
        assert auth.create_key(session, user, "a", asked)[0].scopes == kept


def test_an_expired_key_is_worth_nothing(web, session, user):
    key, text = key_of(session, user, days=1)
    assert program(web, text).get("/v1/studio").status_code == 200
    held = auth.Pass(key_id=key.id)
    assert auth.still_good(session, [held]) == {held}
    session.execute(update(ApiKey).values(expires_at=func.clock_timestamp() - timedelta(seconds=1)))
    session.commit()
    refused = program(web, text).get("/v1/studio")
    assert refused.status_code == 401 and "expired" in refused.json()["error"]["message"]
    assert auth.still_good(session, [held]) == set(), "its streams end too"
    for days in (0, -1, 4000, float("nan")):
        with pytest.raises(BadField):
            auth.create_key(session, user, "a", (), days)


def test_the_page_makes_and_shows_them(client, session, user):
    page = client.post("/settings/keys", data={"name": "reader", "scope": "read", "days": "30"}).text
    text = re.search(r"OPENAI_API_KEY=(sk-luthier-[\w-]+)", page)[1]
    key = session.scalars(select(ApiKey)).one()
    assert key.scopes == ["read"] and 29.9 < (key.expires_at - key.created_at).total_seconds() / 86_400 < 30.1
    assert '<td data-label="Scopes">read</td>' in client.get("/settings").text
    assert program(client, text).get("/v1/files").status_code == 200
    assert client.post("/settings/keys", data={"name": "a", "days": "7"}).status_code == 400
    assert client.post("/settings/keys", data={"name": "a", "scope": "king"}).status_code == 400
