"""People beside the first: invitations, roles, disabled accounts, sessions, passwords and two-step codes, by requests."""

from __future__ import annotations

import re
import threading
import time
from datetime import timedelta

import pytest
from sqlalchemy import func, select, update
from starlette.testclient import TestClient

from app.db import transaction
from app.errors import BadField, Conflict, NotFound
from app.kit import ids, totp
from app.settings import get_settings
from app.tables import ApiKey, BrowserSession, Invitation, TwoStep, User
from app.web import auth, people, sessions, two_step
from tests.conftest import ORIGIN, csrf_token

PASSWORD = "spruce and maple"


def browser(web, **headers: str) -> TestClient:
    return TestClient(web.app, base_url=ORIGIN, headers={"origin": ORIGIN, **headers})


def ready(asker: TestClient) -> TestClient:
    """With the token of its pages."""
    asker.headers["x-csrf-token"] = csrf_token(asker.get("/settings/account").text)
    return asker


def signed_in(web, session, user: User) -> TestClient:
    link = auth.new_sign_in_link(session, user)
    session.commit()
    asker = browser(web)
    assert asker.get(link, follow_redirects=False).status_code == 303
    return ready(asker)


@pytest.fixture
def member(session) -> User:
    return made(session, "Ada", "member")


def made(session, name: str, role: str) -> User:
    found = User(name=name, role=role)
    session.add(found)
    session.commit()
    return found


def with_key(web, session, user: User) -> TestClient:
    _, text = auth.create_key(session, user, "a program")
    session.commit()
    return TestClient(web.app, base_url=ORIGIN, headers={"authorization": f"Bearer {text}"})


# Invitations ----------------------------------------------------------------------------------------------------------


def test_an_invitation_from_the_page_to_a_first_sign_in(web, client, session):
    page = client.post("/settings/people/invitations", data={"role": "viewer", "note": "Bo from the lab"})
    path = re.search(r'id="invitation-link">http://127.0.0.1:8000(/invitation/[\w-]+)<', page.text)[1]
    token = path.rpartition("/")[2]
    assert token not in str(session.scalars(select(Invitation)).one().__dict__), "only the hash is stored"
    assert "Bo from the lab" in client.get("/settings/people").text and token not in client.get("/settings/people").text
    guest = browser(web)
    assert "viewer" in guest.get(path).text and guest.get(path).status_code == 200, "to look at it does not use it up"
    short = guest.post(path, data={"name": "Bo", "password": "short"})
    assert short.status_code == 400 and "characters" in short.text and 'value="Bo"' in short.text
    taken = guest.post(path, data={"name": "OWNER", "password": PASSWORD})
    assert taken.status_code == 409 and "already" in taken.text
    assert guest.post(path, data={"name": "Bo", "password": PASSWORD}, follow_redirects=False).status_code == 303
    assert guest.get("/", follow_redirects=False).status_code == 200
    bo = session.scalars(select(User).where(User.name == "Bo")).one()
    assert bo.role == "viewer" and bo.password_hash.startswith("$argon2id$")
    for method in ("get", "post"):
        again = getattr(browser(web), method)(path, **({"data": {"name": "Eve", "password": PASSWORD}} if method == "post" else {}))
        assert again.status_code == 404
    later = browser(web)
    assert later.post("/sign-in", data={"name": "Bo", "password": PASSWORD}, follow_redirects=False).headers["location"] == "/"


def test_of_two_who_open_one_invitation_one_gets_in(web, session, user):
    _, path = people.invite(session, user, "member")
    session.commit()
    statuses = []

    def open_it(name: str) -> None:
        statuses.append(browser(web).post(path, data={"name": name, "password": PASSWORD}, follow_redirects=False).status_code)

    threads = [threading.Thread(target=open_it, args=(f"person {n}",)) for n in range(6)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(statuses) == [303, 404, 404, 404, 404, 404]
    assert session.scalar(select(func.count()).select_from(User)) == 2


def test_an_invitation_ends_by_time_by_revocation_and_with_whoever_made_it(session, user, member):
    old, revoked, of_somebody = (people.invite(session, by, "member") for by in (user, user, member))
    session.execute(update(Invitation).where(Invitation.id == old[0].id).values(expires_at=func.now() - timedelta(seconds=1)))
    people.revoke(session, revoked[0])
    people.disable(session, member)
    for _, path in (old, revoked, of_somebody):
        with pytest.raises(NotFound):
            people.accept(session, path.rpartition("/")[2], "Eve", "x")
    assert people.open_invitations(session) == []


@pytest.mark.parametrize("name", ["", " ", "a\u200bb", "a  b", "a/b", "<b>", "x" * 81, "a\nb", "a\u202eb"])
def test_names_that_look_like_others_or_like_markup_are_refused(session, user, name):
    with pytest.raises(BadField):
        people.clean_name(name)


def test_programs_invite_too(api, session):
    made = api.post("/v1/organization/invites", json={"role": "member", "note": "Ada", "days": 2}).json()
    assert made["status"] == "pending" and made["url"].startswith(f"{ORIGIN}/invitation/")
    assert api.get(f"/v1/organization/invites/{made['id']}").json()["url"] is None
    assert [one["id"] for one in api.get("/v1/organization/invites").json()["data"]] == [made["id"]]
    assert api.delete(f"/v1/organization/invites/{made['id']}").json()["deleted"] is True
    assert api.get(f"/v1/organization/invites/{made['id']}").json()["status"] == "revoked"
    for wrong in ({"role": "king"}, {"days": 0}, {"days": 91}, {"roles": "admin"}):
        assert api.post("/v1/organization/invites", json=wrong).status_code == 400, wrong


# Roles ----------------------------------------------------------------------------------------------------------------


def test_roles_from_the_page_and_by_the_api(client, api, session, member):
    key = ids.public(ids.USER, member.id)
    assert client.post(f"/settings/people/{key}/role", data={"role": "viewer"}, follow_redirects=False).status_code == 303
    assert api.get(f"/v1/organization/users/{key}").json()["role"] == "viewer"
    assert api.post(f"/v1/organization/users/{key}", json={"role": "admin"}).json()["role"] == "admin"
    assert client.post(f"/settings/people/{key}/role", data={"role": "king"}).status_code == 400
    listed = api.get("/v1/organization/users?limit=1").json()
    assert listed["has_more"] and len(api.get(f"/v1/organization/users?after={listed['last_id']}").json()["data"]) == 1


def test_the_last_admin_stays_one(client, session, user, member):
    key = ids.public(ids.USER, user.id)
    for path, data in (("role", {"role": "member"}), ("disable", {})):
        refused = client.post(f"/settings/people/{key}/{path}", data=data)
        assert refused.status_code == 409 and "only admin" in refused.text
    people.set_role(session, member, "admin")
    session.commit()
    assert client.post(f"/settings/people/{key}/role", data={"role": "member"}, follow_redirects=False).status_code == 303
    with pytest.raises(Conflict):
        people.disable(session, member)


def test_two_admins_who_demote_each_other_leave_one(session, user, member):
    people.set_role(session, member, "admin")
    session.commit()
    ends = []

    def demote(key) -> None:
        try:
            with transaction() as own:
                people.set_role(own, people.get(own, key), "member")
                own.flush()
                time.sleep(0.2)
            ends.append("done")
        except Conflict:
            ends.append("refused")

    threads = [threading.Thread(target=demote, args=(key,)) for key in (user.id, member.id)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(ends) == ["done", "refused"]


# Disabled -------------------------------------------------------------------------------------------------------------


def test_a_disabled_person_is_out_at_once_and_everywhere(web, client, session, member):
    asker, program = signed_in(web, session, member), with_key(web, session, member)
    link = auth.new_sign_in_link(session, member)
    session.commit()
    assert asker.get("/jobs").status_code == 200 and program.get("/v1/studio").status_code == 200
    key = ids.public(ids.USER, member.id)
    assert client.post(f"/settings/people/{key}/disable", follow_redirects=False).status_code == 303
    assert asker.get("/jobs", follow_redirects=False).status_code == 303
    assert program.get("/v1/studio").status_code == 401
    assert browser(web).get(link).status_code == 404
    client.post(f"/settings/people/{key}/enable")
    assert asker.get("/jobs", follow_redirects=False).status_code == 303, "a session does not come back"
    assert program.get("/v1/studio").status_code == 401, "nor does a key"
    assert signed_in(web, session, member).get("/jobs").status_code == 200


def test_what_was_made_while_somebody_was_being_disabled_is_worth_nothing(web, session, member):
    """A session or a key whose row came in a moment too late: the account itself is looked at."""
    asker, program = signed_in(web, session, member), with_key(web, session, member)
    member.disabled_at = func.clock_timestamp()
    session.commit()
    assert asker.get("/jobs", follow_redirects=False).status_code == 303 and program.get("/v1/studio").status_code == 401
    held = [auth.Pass(key_id=session.scalars(select(ApiKey.id)).one())]
    held += [auth.Pass(token_sha256=session.scalars(select(BrowserSession.token_sha256)).one())]
    assert auth.still_good(session, held) == set(), "its streams end too"


def test_a_disabled_password_says_nothing_else_than_a_wrong_one(web, session, user, member):
    member.password_hash = auth.passwords.hash_of(PASSWORD)
    session.commit()
    people.disable(session, member)
    session.commit()
    answer = browser(web).post("/sign-in", data={"name": "Ada", "password": PASSWORD})
    assert answer.status_code == 401 and "do not match" in answer.text


# Password and sessions ------------------------------------------------------------------------------------------------


def test_another_password_ends_the_other_sessions(web, session, member):
    here, there = signed_in(web, session, member), signed_in(web, session, member)
    first = {"password": PASSWORD}
    assert here.post("/settings/account/password", data=first, follow_redirects=False).status_code == 303
    assert here.get("/settings/account").status_code == 200
    assert there.get("/settings/account", follow_redirects=False).status_code == 303
    wrong = here.post("/settings/account/password", data={"current": "wrong", "password": "another password"})
    assert wrong.status_code == 401
    right = {"current": PASSWORD, "password": "another password"}
    assert here.post("/settings/account/password", data={**right, "password": "short"}).status_code == 400
    assert here.post("/settings/account/password", data=right, follow_redirects=False).status_code == 303
    assert browser(web).post("/sign-in", data={"name": "Ada", "password": PASSWORD}).status_code == 401
    assert browser(web).post("/sign-in", data={"name": "Ada", "password": "another password"}, follow_redirects=False).status_code == 303


def test_wrong_current_passwords_are_counted(web, session, member):
    member.password_hash = auth.passwords.hash_of(PASSWORD)
    session.commit()
    here = signed_in(web, session, member)
    data = {"current": "wrong", "password": "another password"}
    statuses = [here.post("/settings/account/password", data=data).status_code for _ in range(6)]
    assert statuses == [401] * 5 + [429]


def test_a_password_that_is_a_setting_is_changed_there_and_ends_the_sessions(client, session, user, monkeypatch):
    for number, given in enumerate(("first one", "second one")):
        monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", given)
        get_settings.cache_clear()
        auth.first_user(session)
        session.commit()
        assert client.get("/jobs", follow_redirects=False).status_code == (200, 303)[number]


def test_the_page_refuses_to_change_a_password_that_is_a_setting(client, session, monkeypatch):
    monkeypatch.setenv("LUTHIER_ADMIN_PASSWORD", "a setting")
    get_settings.cache_clear()
    refused = client.post("/settings/account/password", data={"password": PASSWORD})
    assert refused.status_code == 409 and "LUTHIER_ADMIN_PASSWORD" in refused.text


def test_sessions_are_listed_and_ended(web, client, session, user, member):
    other = browser(web, **{"user-agent": "Mozilla/5.0 (X11; Linux x86_64; rv:140.0) Gecko/20100101 Firefox/140.0"})
    link = auth.new_sign_in_link(session, user)
    session.commit()
    other.get(link)
    page = client.get("/settings/account").text
    assert "Firefox on Linux" in page and "This browser" in page and page.count("testclient") >= 1, "the address too"
    theirs = signed_in(web, session, member)
    rows = {
        sessions.browser_name(row.browser): row for row in session.scalars(select(BrowserSession).where(BrowserSession.user_id == user.id))
    }
    key = rows["Firefox on Linux"].id
    assert theirs.post(f"/settings/account/sessions/{key}/end").status_code == 404, "another person's"
    assert other.get("/jobs", follow_redirects=False).status_code == 200
    assert client.post(f"/settings/account/sessions/{key}/end", follow_redirects=False).status_code == 303
    assert other.get("/jobs", follow_redirects=False).status_code == 303
    assert client.get("/jobs", follow_redirects=False).status_code == 200
    assert client.post("/settings/account/sign-out-everywhere", follow_redirects=False).headers["location"] == "/sign-in"
    assert client.get("/jobs", follow_redirects=False).status_code == 303
    assert theirs.get("/jobs", follow_redirects=False).status_code == 200


def test_last_use_of_a_session_is_written_once_a_minute(client, session):
    row = session.scalars(select(BrowserSession)).one()
    first = row.last_used_at
    client.get("/jobs")
    session.refresh(row)
    assert row.last_used_at == first
    session.execute(update(BrowserSession).values(last_used_at=func.now() - timedelta(minutes=2)))
    session.commit()
    client.get("/jobs")
    session.refresh(row)
    assert row.last_used_at >= first


# Two-step codes -------------------------------------------------------------------------------------------------------


def code_of(session, user: User, ahead: int = 0) -> str:
    session.expire_all()
    return totp.code_at(two_step.key_of(session.get_one(TwoStep, user.id)), int(time.time()) // 30 + ahead)


@pytest.fixture
def guarded(web, session, member) -> tuple[TestClient, list[str]]:
    """Ada, who has a password and has turned on two-step sign-in on the page: her browser and her recovery codes."""
    member.password_hash = auth.passwords.hash_of(PASSWORD)
    session.commit()
    asker = signed_in(web, session, member)
    asker.post("/settings/account/two-step")
    assert two_step.is_on(session, member.id) is False, "nothing is asked for before the first right code"
    assert asker.post("/settings/account/two-step/confirm", data={"code": "000000"}).status_code == 401
    page = asker.post("/settings/account/two-step/confirm", data={"code": code_of(session, member, -1)})
    codes = re.search(r'id="recovery">([^<]+)<', page.text)[1].split()
    assert len(codes) == two_step.NUM_RECOVERY and codes[0] not in asker.get("/settings/account").text
    assert not any(code in str(session.get_one(TwoStep, member.id).recovery) for code in codes), "only hashes are stored"
    return asker, codes


def ticket(asker: TestClient) -> str:
    page = asker.post("/sign-in", data={"name": "Ada", "password": PASSWORD, "next": "/jobs"}, follow_redirects=False)
    assert page.status_code == 200 and not asker.get("/jobs", follow_redirects=False).is_success, "the password alone signs nobody in"
    return re.search(r'name="ticket" value="([^"]+)"', page.text)[1]


def test_after_the_password_a_code_is_asked_for_and_none_counts_twice(web, session, member, guarded):
    code = code_of(session, member)
    first, second = browser(web), browser(web)
    data = {"ticket": ticket(first), "code": code, "next": "/jobs"}
    assert first.post("/sign-in/code", data={**data, "code": "000000"}).status_code == 401
    assert first.post("/sign-in/code", data=data, follow_redirects=False).headers["location"] == "/jobs"
    assert first.get("/jobs", follow_redirects=False).status_code == 200
    replayed = second.post("/sign-in/code", data={**data, "ticket": ticket(second)}, follow_redirects=False)
    assert replayed.status_code == 401 and not second.get("/jobs", follow_redirects=False).is_success


def test_one_code_sent_twice_at_once_lets_one_in(web, session, member, guarded):
    code, askers = code_of(session, member), [browser(web) for _ in range(4)]
    tickets, statuses = [ticket(asker) for asker in askers], []

    def send(n: int) -> None:
        answer = askers[n].post("/sign-in/code", data={"ticket": tickets[n], "code": code}, follow_redirects=False)
        statuses.append(answer.status_code)

    threads = [threading.Thread(target=send, args=(n,)) for n in range(4)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert sorted(statuses) == [303, 401, 401, 401]


def test_a_recovery_code_signs_in_once(web, session, member, guarded):
    _, codes = guarded
    asker = browser(web)
    used = {"ticket": ticket(asker), "code": f" {codes[3].upper()} "}
    assert asker.post("/sign-in/code", data=used, follow_redirects=False).status_code == 303
    asker.cookies.clear()
    assert asker.post("/sign-in/code", data=used).status_code == 401
    session.expire_all()
    assert len(session.get_one(TwoStep, member.id).recovery) == two_step.NUM_RECOVERY - 1


def test_wrong_codes_are_counted_like_wrong_passwords(web, session, member, guarded):
    asker = browser(web)
    held = ticket(asker)
    statuses = [asker.post("/sign-in/code", data={"ticket": held, "code": "000000"}).status_code for _ in range(6)]
    assert statuses == [401] * 5 + [429]
    right = asker.post("/sign-in/code", data={"ticket": held, "code": code_of(session, member)}, follow_redirects=False)
    assert right.status_code == 429 and int(right.headers["retry-after"]) > 0


def test_a_ticket_ends_with_time_with_the_password_and_with_the_account(web, session, member, guarded, monkeypatch):
    asker = browser(web)
    held = ticket(asker)
    assert asker.post("/sign-in/code", data={"ticket": held[:-2], "code": code_of(session, member)}).status_code == 401
    monkeypatch.setattr(two_step, "TICKET_SECONDS", -1)
    assert "too long" in asker.post("/sign-in/code", data={"ticket": held, "code": code_of(session, member)}).text
    monkeypatch.undo()
    member.password_hash = auth.passwords.hash_of("another password")
    session.commit()
    assert asker.post("/sign-in/code", data={"ticket": held, "code": code_of(session, member)}, follow_redirects=False).status_code == 401


def test_it_is_turned_off_with_a_code_alone(web, session, member, guarded):
    asker, codes = guarded
    assert asker.post("/settings/account/two-step/off", data={"code": "000000"}).status_code == 401
    assert asker.post("/settings/account/two-step").status_code == 409, "nobody puts another secret in its place"
    assert asker.post("/settings/account/two-step/off", data={"code": codes[0]}, follow_redirects=False).status_code == 303
    session.expire_all()
    assert not two_step.is_on(session, member.id)
    assert browser(web).post("/sign-in", data={"name": "Ada", "password": PASSWORD}, follow_redirects=False).status_code == 303


def test_the_database_alone_gives_no_codes(session, member, data_dir):
    two_step.begin(session, member)
    session.commit()
    first = two_step.key_of(session.get_one(TwoStep, member.id))
    (data_dir / "secrets" / "two_step.key").write_bytes(b"x" * 32)
    auth.secret.cache_clear()
    assert two_step.key_of(session.get_one(TwoStep, member.id)) != first
