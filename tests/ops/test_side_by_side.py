"""Programs of two versions beside each other, while those of one studio are replaced one after the other."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
from sqlalchemy import text

from app import migrate
from app.db import get_engine
from app.settings import PROJECT

NARROWS = ("drop_", "rename_table", "alter_column", "create_check_constraint")
"""Operations of Alembic after which an older program may ask for what is gone, or write what is refused."""


def narrowing(path: Path) -> list[str]:
    """What the `upgrade` of a step does that an older program may trip over."""
    tree = ast.parse(path.read_text())
    up = next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "upgrade")
    calls = [node for node in ast.walk(up) if isinstance(node, ast.Call) and ast.unparse(node.func).startswith("op.")]
    named = [ast.unparse(call.func).removeprefix("op.") for call in calls if not _only_comments(call)]
    said = [ast.unparse(call) for call in calls if ast.unparse(call.func) == "op.execute"]
    return [name for name in named if name.startswith(NARROWS)] + [
        one for one in said if any(word in one for word in (" DROP ", " RENAME "))
    ]


def _only_comments(call: ast.Call) -> bool:
    return ast.unparse(call.func) == "op.alter_column" and {one.arg for one in call.keywords} <= {"comment", "existing_comment"}


def steps_after(oldest: str) -> list[Path]:
    return [path for path in (PROJECT / "migrations" / "versions").glob("0*.py") if path.name[:4] > oldest]


def test_no_step_takes_away_what_older_programs_use():
    assert migrate.OLDEST in migrate.steps()
    found = {path.name: names for path in steps_after(migrate.OLDEST) if (names := narrowing(path))}
    assert not found, f"raise OLDEST of app/migrate.py, or leave it to a later release: {found}"
    assert any(narrowing(path) for path in steps_after("0000")), "nothing is seen"


@pytest.fixture
def schema_says(session):
    """Have the schema say something else of whom it serves, until the end of the test: the database is handed on."""

    def say(words: str) -> None:
        session.execute(text(f"COMMENT ON TABLE alembic_version IS '{words}'"))
        session.commit()

    yield say
    say(f"{migrate._SERVES}{migrate.OLDEST}")


def test_an_older_program_goes_on_with_a_newer_schema_that_serves_it(api, session, monkeypatch, schema_says):
    assert api.get("/readyz").json()["checks"]["migrations"]["message"] == "up to date"
    known = migrate.steps()
    monkeypatch.setattr(migrate, "steps", lambda: known[:-1])  # this program is older than its database
    schema_says("")
    assert api.get("/readyz").status_code == 503
    schema_says(f"{migrate._SERVES}{known[-2]}")
    ready = api.get("/readyz")
    assert ready.status_code == 200 and ready.json()["checks"]["migrations"]["message"] == "newer, and serves this version too"
    migrate.upgrade(get_engine().url.render_as_string(hide_password=False))  # an older program has nothing to bring up to date
    monkeypatch.setattr(migrate, "steps", lambda: known[:-2])
    ready = api.get("/readyz")
    assert ready.status_code == 503 and ready.json()["checks"]["migrations"]["message"] == "of another version"
    monkeypatch.setattr(migrate, "steps", lambda: [*known, "9999"])
    assert api.get("/readyz").status_code == 503, "a program waits for the steps that it knows"


def test_the_newest_schema_says_whom_it_serves(postgres, session):
    from sqlalchemy import NullPool, create_engine

    engine = create_engine(postgres.url_of("template_luthier"), poolclass=NullPool)
    with engine.connect() as connection:
        said = connection.scalar(text("SELECT obj_description('alembic_version'::regclass, 'pg_class')"))
    assert said == f"serves programs from step {migrate.OLDEST}"
