"""Users, links, passwords, sessions and keys, on a real database and a real Valkey."""

from __future__ import annotations

import stat
import time
from datetime import timedelta

import pytest
from sqlalchemy import event, func, select, update
from starlette.testclient import TestClient

from app import accounts
from app.db import get_engine
from app.errors import NotFound, NotSignedIn, TooMany
from app.settings import get_settings
from app.tables import ApiKey, BrowserSession, SignInLink, User


@pytest.fixture
def password(session, monkeypatch) -> User:
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "spruce and maple")
    get_settings.cache_clear()
    user = accounts.first_user(session)
    session.commit()
    return user


def test_first_user_is_made_once_and_follows_the_password(session, monkeypatch):
    user = accounts.first_user(session)
    assert user.name == "owner" and user.password_hash is None
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "first")
    get_settings.cache_clear()
    assert accounts.first_user(session).id == user.id
    first = user.password_hash
    assert first and first.startswith("$argon2id$")
    assert accounts.first_user(session).password_hash == first, "an unchanged password keeps its hash"
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "second")
    get_settings.cache_clear()
    assert accounts.first_user(session).password_hash != first
    assert session.scalar(select(func.count()).select_from(User)) == 1


def test_a_link_signs_in_once(session, user):
    token = accounts.new_sign_in_link(session, user).rsplit("/", 1)[1]
    assert token not in str(session.scalars(select(SignInLink)).one().__dict__), "only the hash is stored"
    assert accounts.use_link(session, token).id == user.id
    with pytest.raises(NotFound):
        accounts.use_link(session, token)


def test_an_old_link_is_refused(session, user):
    token = accounts.new_sign_in_link(session, user, minutes=-1).rsplit("/", 1)[1]
    with pytest.raises(NotFound):
        accounts.use_link(session, token)


def test_password(session, password):
    assert accounts.check_password(session, "owner", "spruce and maple", "10.0.0.1").id == password.id
    for name, given in (("owner", "wrong"), ("nobody", "spruce and maple"), ("owner", "")):
        with pytest.raises(NotSignedIn):
            accounts.check_password(session, name, given, "10.0.0.2")


def test_five_failures_lock_this_account_from_this_address_alone(session, password):
    for _ in range(5):
        with pytest.raises(NotSignedIn):
            accounts.check_password(session, "owner", "wrong", "10.0.0.3")
    with pytest.raises(TooMany) as locked:
        accounts.check_password(session, "owner", "spruce and maple", "10.0.0.3")
    assert 0 < locked.value.retry_after_seconds <= 30
    assert accounts.check_password(session, "owner", "spruce and maple", "10.0.0.4").id == password.id


def test_each_further_failure_doubles_the_wait(session, password):
    from app.queue import get_redis

    tries, waits = accounts._Tries("owner", "10.0.0.5"), []
    for _ in range(12):
        tries.failed()
        waits.append(max(0, get_redis().ttl(f"{tries.key}:wait")))
    assert waits[:7] == [0, 0, 0, 0, 30, 60, 120] and waits[-1] == accounts.LONGEST_WAIT_SECONDS


def test_one_person_cannot_walk_through_his_own_ipv6_network():
    assert accounts._network("2001:db8::1") == accounts._network("2001:db8::ffff:2")
    assert accounts._network("10.0.0.1") != accounts._network("10.0.0.2")


def test_unknown_names_take_as_long_as_known_ones(session, password):
    def seconds(name: str, address: str) -> float:
        taken = []
        for turn in range(5):
            begun = time.process_time()
            with pytest.raises(NotSignedIn):
                accounts.check_password(session, name, "wrong", f"{address}{turn}")
            taken.append(time.process_time() - begun)
        return min(taken)

    accounts._nobody()
    known, unknown = seconds("owner", "10.1.0."), seconds("nobody", "10.2.0.")
    assert abs(known - unknown) < 0.5 * known, f"{known:.4f} s against {unknown:.4f} s tells who exists"


def test_a_password_sign_in_through_the_page(web, session, password):
    browser = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"origin": "http://127.0.0.1:8000"})
    page = browser.get("/sign-in?next=/settings")
    assert 'name="password"' in page.text
    wrong = browser.post("/sign-in", data={"name": "owner", "password": "wrong"})
    assert wrong.status_code == 401 and "do not match" in wrong.text
    right = browser.post("/sign-in", data={"name": "owner", "password": "spruce and maple", "next": "/settings"}, follow_redirects=False)
    assert right.status_code == 303 and right.headers["location"] == "/settings"
    assert browser.get("/settings").status_code == 200


@pytest.mark.parametrize("target", ["//evil.example/", "/\\evil.example", "https://evil.example", "javascript:alert(1)", "/a\nb"])
def test_next_never_leaves_the_studio(target):
    from app.routes.accounts import safe_next

    assert safe_next(target) == "/"


def test_cookie_is_out_of_reach_of_scripts_and_the_token_is_not_stored(web, session, user):
    browser = TestClient(web.app, base_url="http://127.0.0.1:8000")
    link = accounts.new_sign_in_link(session, user)
    session.commit()
    answer = browser.get(link, follow_redirects=False)
    cookie = answer.headers["set-cookie"].lower()
    assert "httponly" in cookie and "samesite=lax" in cookie and "secure" not in cookie
    token = answer.cookies["luthier"]
    stored = session.scalars(select(BrowserSession)).one().token_sha256
    assert token != stored and stored == accounts.sha256(token)


def test_https_gets_a_host_cookie(web, session, user):
    browser = TestClient(web.app, base_url="https://127.0.0.1:8000")
    link = accounts.new_sign_in_link(session, user)
    session.commit()
    answer = browser.get(link, follow_redirects=False)
    cookie = answer.headers["set-cookie"]
    assert cookie.startswith("__Host-luthier=") and "Secure" in cookie and "Path=/" in cookie and "Domain" not in cookie
    assert "max-age" in answer.headers["strict-transport-security"]


def stranger(client: TestClient, token: str) -> TestClient:
    """Somebody who kept a copy of the cookie."""
    return TestClient(client.app, base_url="http://127.0.0.1:8000", cookies={"luthier": token})


def test_signing_in_again_makes_a_new_session_and_ends_the_old_one(client, session, user):
    old = client.cookies["luthier"]
    link = accounts.new_sign_in_link(session, user)
    session.commit()
    client.get(link)
    assert client.cookies["luthier"] != old
    assert client.get("/", follow_redirects=False).status_code == 200
    assert stranger(client, old).get("/", follow_redirects=False).status_code == 303


def test_sign_out_revokes_on_the_server(client):
    token = client.cookies["luthier"]
    assert client.post("/sign-out", follow_redirects=False).headers["location"] == "/sign-in"
    assert stranger(client, token).get("/settings", follow_redirects=False).status_code == 303, "the old cookie must be worth nothing"


def test_an_expired_session_is_refused(client, session):
    session.execute(update(BrowserSession).values(expires_at=func.clock_timestamp() - timedelta(seconds=1)))
    session.commit()
    assert client.get("/", follow_redirects=False).status_code == 303


def test_api_key_lives_until_it_is_revoked(web, session, user):
    key, text = accounts.create_key(session, user, "laptop")
    session.commit()
    assert text.startswith(f"sk-luthier-{key.id.hex}-") and key.hint == text[-4:]
    secret = text.split("-", 3)[3]
    assert secret not in str({c.name: getattr(key, c.name) for c in ApiKey.__table__.columns}), "the secret itself is not stored"
    asker = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"authorization": f"Bearer {text}"})
    assert asker.get("/v1/studio").status_code == 200
    session.expire_all()
    assert session.get_one(ApiKey, key.id).last_used_at is not None
    accounts.revoke_key(session, user, key.id)
    session.commit()
    refused = asker.get("/v1/studio")
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"


def test_keys_of_another_shape_are_refused(web):
    for text in ("", "x", "sk-luthier-", "sk-luthier-zz-yy", f"sk-luthier-{'0' * 32}-secret", f"sk-luthier-{'g' * 32}-s", "é"):
        asker = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"authorization": f"Bearer {text}".encode()})
        assert asker.get("/v1/studio").status_code == 401, text


def test_a_wrong_secret_behind_a_right_id_is_refused(web, session, user):
    _, text = accounts.create_key(session, user, "laptop")
    session.commit()
    asker = TestClient(
        web.app, base_url="http://127.0.0.1:8000", headers={"authorization": f"Bearer {text[:-1]}{'A' if text[-1] != 'A' else 'B'}"}
    )
    assert asker.get("/v1/studio").status_code == 401


def test_another_persons_key_is_not_found(session, user):
    other = User(name="other")
    session.add(other)
    session.flush()
    key, _ = accounts.create_key(session, other, "theirs")
    with pytest.raises(NotFound):
        accounts.revoke_key(session, user, key.id)


def test_one_query_tells_who_asks(api, client):
    for asker, path in ((api, "/v1/studio"), (client, "/v1/studio")):
        asker.get(path)
        seen: list[str] = []
        listen = lambda conn, cursor, statement, *rest: seen.append(statement)  # noqa: E731, B023
        event.listen(get_engine(), "before_cursor_execute", listen)
        asker.get(path)
        event.remove(get_engine(), "before_cursor_execute", listen)
        asked = [s for s in seen if "users" in s]
        assert len(asked) == 1, asked
        assert not [s for s in seen if s.startswith("UPDATE")], "a key used a second ago is not written again"


def test_secrets_are_made_once_and_for_the_owner_alone(data_dir):
    accounts.secret.cache_clear()
    first = accounts.secret()
    path = data_dir / "secrets" / "session.key"
    assert len(first) == 32 and stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    accounts.secret.cache_clear()
    assert accounts.secret() == first and list(path.parent.iterdir()) == [path], "no draft is left behind"
