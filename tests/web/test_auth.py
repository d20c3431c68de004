"""Users, links, passwords, sessions and keys, on a real database and a real Valkey."""

from __future__ import annotations

import asyncio
import re
import stat
import time
import uuid
from collections import Counter
from datetime import timedelta

import pytest
from sqlalchemy import event, func, select, update
from starlette.testclient import TestClient

from app.db import get_engine
from app.errors import NotFound, NotSignedIn, TooMany
from app.kit.addresses import network_of
from app.settings import get_settings
from app.tables import ApiKey, BrowserSession, SignInLink, User
from app.web import auth, passwords
from app.web import templates as web_pages


@pytest.fixture
def password(session, monkeypatch) -> User:
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "spruce and maple")
    get_settings.cache_clear()
    user = auth.first_user(session)
    session.commit()
    return user


def test_first_user_is_made_once_and_follows_the_password(session, monkeypatch):
    user = auth.first_user(session)
    assert user.name == "owner" and user.password_hash is None
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "first")
    get_settings.cache_clear()
    assert auth.first_user(session).id == user.id
    first = user.password_hash
    assert first and first.startswith("$argon2id$")
    assert auth.first_user(session).password_hash == first, "an unchanged password keeps its hash"
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "second")
    get_settings.cache_clear()
    assert auth.first_user(session).password_hash != first
    assert session.scalar(select(func.count()).select_from(User)) == 1


def test_a_link_signs_in_once(session, user):
    token = auth.new_sign_in_link(session, user).rsplit("/", 1)[1]
    assert token not in str(session.scalars(select(SignInLink)).one().__dict__), "only the hash is stored"
    assert auth.use_link(session, token).id == user.id
    with pytest.raises(NotFound):
        auth.use_link(session, token)


def test_an_old_link_is_refused(session, user):
    token = auth.new_sign_in_link(session, user, minutes=-1).rsplit("/", 1)[1]
    with pytest.raises(NotFound):
        auth.use_link(session, token)


def check(name: str, given: str, address: str, browser: str | None = None) -> uuid.UUID:
    return asyncio.run(auth.check_password(name, given, address, browser))


def fail(name: str, address: str, browser: str | None = None) -> None:
    with pytest.raises(NotSignedIn):
        check(name, "wrong", address, browser)


def refused(name: str, address: str, browser: str | None = None) -> float:
    """Seconds that even the right password has to wait."""
    with pytest.raises(TooMany) as locked:
        check(name, "spruce and maple", address, browser)
    return locked.value.retry_after_seconds


def test_password(session, password):
    assert check("owner", "spruce and maple", "10.0.0.1") == password.id
    for name, given in (("owner", "wrong"), ("nobody", "spruce and maple"), ("owner", "")):
        with pytest.raises(NotSignedIn):
            check(name, given, "10.0.0.2")


def test_five_failures_lock_this_account_from_this_address_alone(session, password):
    for _ in range(5):
        fail("owner", "10.0.0.3")
    assert 0 < refused("owner", "10.0.0.3") <= 30
    assert check("owner", "spruce and maple", "10.0.0.4") == password.id


def test_of_many_tries_at_once_no_more_are_judged_than_one_after_the_other(session, password):
    """The count is taken before the password is looked at; the judge is asked five times."""
    judged = []
    real = passwords.matches

    async def all_at_once():
        tries = [auth.check_password("owner", f"wrong {n}", "10.0.0.9") for n in range(16)]
        return await asyncio.gather(*tries, return_exceptions=True)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(passwords, "matches", lambda *given: judged.append(1) or real(*given))
        found = asyncio.run(all_at_once())
    assert Counter(type(one) for one in found) == {NotSignedIn: 5, TooMany: 11} and len(judged) == 5


def test_each_further_failure_doubles_the_wait(session, password):
    from app.queue import get_redis

    tries, waits = passwords.Tries("owner", "10.0.0.5"), []
    pair = next(key for key, limit in tries.limits.items() if limit is passwords.PAIR)
    for _ in range(12):
        tries.take()
        waits.append(max(0, get_redis().ttl(f"{pair}:wait")))
        get_redis().delete(f"{pair}:wait")
    assert waits[:7] == [0, 0, 0, 0, 30, 60, 120] and waits[-1] == passwords.PAIR.max_wait_seconds


def test_an_account_is_slowed_over_all_addresses_and_an_address_over_all_accounts(session, password, monkeypatch):
    monkeypatch.setattr(passwords, "matches", lambda *_: False)
    for n in range(passwords.ACCOUNT.free):
        fail("owner", f"10.3.0.{n}")
    assert 0 < refused("owner", "10.3.1.1") <= 30
    for n in range(passwords.NETWORK.free):
        fail(f"name {n}", "10.4.0.1")
    assert 0 < refused("another name", "10.4.0.1") <= 30
    fail("another name", "10.4.0.2")


def test_the_right_password_frees_no_address_for_guessing_other_accounts(session, password):
    for n in range(passwords.NETWORK.free):
        if n % 5 == 4:
            assert check("owner", "spruce and maple", "10.5.0.1") == password.id
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(passwords, "matches", lambda *_: False)
            fail(f"name {n}", "10.5.0.1")
    assert refused("another name", "10.5.0.1") > 0


@pytest.mark.long
def test_a_stranger_does_not_lock_the_owner_out_of_a_browser_that_was_signed_in_before(web, session, password):
    """From the same address, as with Docker, where everybody comes from its gateway."""
    browser = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"origin": "http://127.0.0.1:8000"})
    right = {"name": "owner", "password": "spruce and maple"}
    assert browser.post("/sign-in", data=right, follow_redirects=False).status_code == 303
    stranger = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"origin": "http://127.0.0.1:8000"})
    answers = [stranger.post("/sign-in", data={"name": "owner", "password": "wrong"}).status_code for _ in range(7)]
    assert answers == [401] * 5 + [429] * 2
    assert stranger.post("/sign-in", data=right, follow_redirects=False).status_code == 429
    assert browser.post("/sign-in", data=right, follow_redirects=False).status_code == 303
    for _ in range(5):
        assert browser.post("/sign-in", data={"name": "owner", "password": "wrong"}).status_code == 401
    assert browser.post("/sign-in", data=right, follow_redirects=False).status_code == 429, "it has a count of its own, and no more"


def test_a_made_up_mark_of_a_known_browser_counts_for_nothing(session, password):
    other = User(name="other")
    session.add(other)
    session.commit()
    theirs = str(auth._known_signer().dumps([other.id.hex, "00"]))
    for n, mark in enumerate(("x", theirs, theirs[:-1], auth._known_signer().dumps("x"), auth._known_signer().dumps([1]))):
        assert auth.known_to(password.id, mark) is None, n


def test_more_passwords_at_once_than_can_be_judged_are_sent_away(session, password, monkeypatch):
    def slow(*_):
        time.sleep(0.05)
        return False

    monkeypatch.setattr(passwords, "matches", slow)

    async def many():
        return await asyncio.gather(*(auth.check_password(f"name {n}", "x", f"10.6.0.{n}") for n in range(30)), return_exceptions=True)

    found = asyncio.run(many())
    kinds = Counter(type(one) for one in found)
    assert kinds[TooMany] >= 1 and kinds[NotSignedIn] >= passwords.AT_ONCE + passwords.MAX_WAITING and kinds.total() == 30, kinds


def test_one_person_cannot_walk_through_his_own_ipv6_network():
    assert network_of("2001:db8::1") == network_of("2001:db8::ffff:2")
    assert network_of("10.0.0.1") != network_of("10.0.0.2") and network_of("::ffff:10.0.0.1") == "10.0.0.1"


@pytest.mark.long
def test_unknown_names_take_as_long_as_known_ones(session, password):
    def seconds(name: str, address: str) -> float:
        taken = []
        for turn in range(5):
            begun = time.process_time()
            fail(name, f"{address}{turn}")
            taken.append(time.process_time() - begun)
        return min(taken)

    passwords._nobody()
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
    link = auth.new_sign_in_link(session, user)
    session.commit()
    answer = browser.get(link, follow_redirects=False)
    for set_cookie in answer.headers.get_list("set-cookie"):
        assert "httponly" in set_cookie.lower() and "samesite=lax" in set_cookie.lower() and "secure" not in set_cookie.lower()
    token = answer.cookies[cookie()]
    stored = session.scalars(select(BrowserSession)).one().token_sha256
    assert token != stored and stored == auth.sha256(token)


def test_https_gets_a_host_cookie(web, session, user):
    browser = TestClient(web.app, base_url="https://127.0.0.1:8000")
    link = auth.new_sign_in_link(session, user)
    session.commit()
    answer = browser.get(link, follow_redirects=False)
    found = answer.headers.get_list("set-cookie")
    assert [one.partition("=")[0] for one in found] == [f"__Host-{cookie()}", f"__Host-{cookie('_known')}"]
    assert all("Secure" in one and "Path=/" in one and "Domain" not in one for one in found)
    assert "max-age" in answer.headers["strict-transport-security"]


def cookie(kind: str = "") -> str:
    """The name of this studio's cookie over plain http."""
    return f"luthier{kind}_{auth.studio_mark()}"


def test_two_studios_at_one_host_name_keep_their_own_cookies(data_dir, monkeypatch):
    from tests.conftest import forget_settings

    names = set()
    for folder in ("one", "other"):
        monkeypatch.setenv("LUTHIER_DATA_DIR", str(data_dir / folder))
        forget_settings()
        names |= {cookie(), web_pages.messages_cookie()}
        assert re.fullmatch(r"luthier_[0-9a-f]{8}", cookie())
    assert len(names) == 4


def stranger(client: TestClient, token: str) -> TestClient:
    """Somebody who kept a copy of the cookie."""
    return TestClient(client.app, base_url="http://127.0.0.1:8000", cookies={cookie(): token})


def test_signing_in_again_makes_a_new_session_and_ends_the_old_one(client, session, user):
    old = client.cookies[cookie()]
    link = auth.new_sign_in_link(session, user)
    session.commit()
    client.get(link)
    assert client.cookies[cookie()] != old
    assert client.get("/", follow_redirects=False).status_code == 200
    assert stranger(client, old).get("/", follow_redirects=False).status_code == 303


def test_sign_out_revokes_on_the_server(client):
    token = client.cookies[cookie()]
    assert client.post("/sign-out", follow_redirects=False).headers["location"] == "/sign-in"
    assert stranger(client, token).get("/settings", follow_redirects=False).status_code == 303, "the old cookie must be worth nothing"


def test_an_expired_session_is_refused(client, session):
    session.execute(update(BrowserSession).values(expires_at=func.clock_timestamp() - timedelta(seconds=1)))
    session.commit()
    assert client.get("/", follow_redirects=False).status_code == 303


def test_api_key_lives_until_it_is_revoked(web, session, user):
    key, text = auth.create_key(session, user, "laptop")
    session.commit()
    assert text.startswith(f"sk-luthier-{key.id.hex}-") and key.hint == text[-4:]
    secret = text.split("-", 3)[3]
    assert secret not in str({c.name: getattr(key, c.name) for c in ApiKey.__table__.columns}), "the secret itself is not stored"
    asker = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"authorization": f"Bearer {text}"})
    assert asker.get("/v1/studio").status_code == 200
    session.expire_all()
    assert session.get_one(ApiKey, key.id).last_used_at is not None
    auth.revoke_key(session, user, key.id)
    session.commit()
    refused = asker.get("/v1/studio")
    assert refused.status_code == 401 and refused.json()["error"]["code"] == "invalid_api_key"


def test_keys_of_another_shape_are_refused(web):
    for text in ("", "x", "sk-luthier-", "sk-luthier-zz-yy", f"sk-luthier-{'0' * 32}-secret", f"sk-luthier-{'g' * 32}-s", "é"):
        asker = TestClient(web.app, base_url="http://127.0.0.1:8000", headers={"authorization": f"Bearer {text}".encode()})
        assert asker.get("/v1/studio").status_code == 401, text


def test_a_wrong_secret_behind_a_right_id_is_refused(web, session, user):
    _, text = auth.create_key(session, user, "laptop")
    session.commit()
    asker = TestClient(
        web.app, base_url="http://127.0.0.1:8000", headers={"authorization": f"Bearer {text[:-1]}{'A' if text[-1] != 'A' else 'B'}"}
    )
    assert asker.get("/v1/studio").status_code == 401


def test_another_persons_key_is_not_found(session, user):
    other = User(name="other")
    session.add(other)
    session.flush()
    key, _ = auth.create_key(session, other, "theirs")
    with pytest.raises(NotFound):
        auth.revoke_key(session, user, key.id)


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
    auth.secret.cache_clear()
    first = auth.secret()
    path = data_dir / "secrets" / "session.key"
    assert len(first) == 32 and stat.S_IMODE(path.stat().st_mode) == 0o600 and stat.S_IMODE(path.parent.stat().st_mode) == 0o700
    auth.secret.cache_clear()
    assert auth.secret() == first and list(path.parent.iterdir()) == [path], "no draft is left behind"
