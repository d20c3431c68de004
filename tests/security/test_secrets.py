"""Secrets that people and programs send (S17): none of them is found afterwards in a log, in a row of the database or in a file of the data
folder but those under `secrets/`."""

from __future__ import annotations

import uuid
from pathlib import Path

import pytest
from sqlalchemy import text

from app.db import get_engine
from app.kit import logs
from app.tables import Base
from app.web import auth, people, projects
from tests.web.test_people import browser, made, ready, signed_in


def tables_with(word: str) -> list[str]:
    """The tables that hold a word anywhere in a row."""
    found = []
    with get_engine().connect() as connection:
        for table in Base.metadata.tables:
            query = text(f'SELECT count(*) FROM "{table}" AS whole WHERE strpos(CAST(whole AS text), :word) > 0')
            if connection.scalar(query, {"word": word}):
                found.append(table)
    return found


def files_with(folder: Path, word: str) -> list[str]:
    found = [path for path in folder.rglob("*") if path.is_file() and "secrets" not in path.relative_to(folder).parts]
    return [str(path) for path in found if word.encode() in path.read_bytes()]


@pytest.mark.long
def test_no_secret_stays_in_a_log_a_row_or_a_file(web, session, user, data_dir, capfd):
    logs.configure()  # to the standard error of this test
    ada = made(session, "Ada", "member")
    password, another, wrong, state = (f"canary {uuid.uuid4().hex}" for _ in range(4))
    _, key = auth.create_key(session, user, "a program")
    _, invitation = people.invite(session, user, "member")
    _, shared = projects.share(session, user, projects.create(session, user, "Violins"))
    link = auth.new_sign_in_link(session, user)
    session.commit()
    words = {"a password": password, "another": another, "a wrong one": wrong, "the secret of a key": key.split("-", 3)[3]}
    words |= {name: path.rpartition("/")[2] for name, path in (("an invitation", invitation), ("a link", shared), ("a sign-in link", link))}

    guest = browser(web)
    assert guest.get(link, follow_redirects=False).status_code == 303
    words["a session"] = next(value for name, value in guest.cookies.items() if "luthier" in name)
    words["a form's token"] = ready(guest).headers["x-csrf-token"]
    assert browser(web).get(shared).status_code == 200
    assert browser(web).post(invitation, data={"name": "Bo", "password": password}, follow_redirects=False).status_code == 303
    for given in (password, wrong):
        browser(web).post("/sign-in", data={"name": "Bo", "password": given}, follow_redirects=False)
    own = signed_in(web, session, ada)
    own.post("/settings/account/password", data={"password": another}, follow_redirects=False)
    program = browser(web, authorization=f"Bearer {key}")
    for way in (
        lambda: program.get("/v1/models"),
        lambda: browser(web).get("/v1/models", params={"api_key": key, "state": state}),
        lambda: browser(web).get(f"/v1/models/{key}"),
        lambda: browser(web, authorization=f"Bearer {key[:-4]}aaaa").get("/v1/models"),
        lambda: program.post("/v1/chat/completions", json={"model": key, "messages": [{"role": "user", "content": "a"}]}),
        lambda: browser(web).get("/oidc/callback", params={"code": password, "state": state}),
    ):
        assert way().status_code < 500

    said = capfd.readouterr().err
    assert said.count("/sign-in") >= 3 and "/v1/models" in said, "no log was kept, so nothing was looked at"
    assert tables_with(user.name) and tables_with("a program"), "what is stored would be found"
    for name, word in words.items():
        assert len(word) > 12, f"{name} is no secret: {word}"
        assert word not in said, f"{name} is in the log"
        assert not tables_with(word), f"{name} is in the database"
        assert not files_with(data_dir, word), f"{name} is in a file"
