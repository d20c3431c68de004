"""One person's data: an archive of all of it and of nobody else's, and its removal."""

from __future__ import annotations

import json
import uuid
import zipfile

import pytest
from sqlalchemy import func, select
from sqlalchemy.orm import Session

from app import personal_data
from app.db import transaction
from app.errors import Conflict, NotFound
from app.storage import files
from app.tables import Answer, Base, Exchange, File, Job, User
from app.web import auth
from tests import lives


@pytest.fixture
def anna(session: Session, user, tiny_registered, data_dir) -> User:
    """A second person, with things in most tables, beside a first who has the same."""
    anna = User(id=uuid.uuid4(), name="anna")
    session.add(anna)
    session.flush()
    for person in (anna, user):
        files.add_bytes(session, person, b"shared bytes", "shared.txt", "assistants")
        files.add_bytes(session, person, f"of {person.name}".encode(), f"{person.name}.txt", "assistants")
        life = lives.Life(session, lives.order(session, person, tiny_registered, name=f"job of {person.name}")).claim()
        life.say(lives.started(), *lives.steps(1, 12)).fail(lives.events.Failed(kind="bad_data", message="Row 3 is empty."))
        exchange = Exchange(owner_id=person.id, prompt=f"asked by {person.name}", sampling={})
        session.add(exchange)
        session.flush()
        session.add(Answer(exchange_id=exchange.id, model_id=tiny_registered.id, model_name="tiny", seed=1, text=f"to {person.name}"))
        auth.create_key(session, person, f"key of {person.name}")
    (data_dir / "runs" / str(session.scalar(select(Job.id).where(Job.owner_id == anna.id))) / "a1").mkdir(parents=True)
    session.commit()
    return anna


def test_the_archive_holds_all_of_one_person_and_nothing_of_another(anna, user, session, tmp_path):
    with transaction() as other:
        counts = personal_data.export(other, personal_data.find(other, "anna"), tmp_path / "anna.zip")
    assert counts["jobs"] == 1 and counts["files"] == 2 and counts["answers"] == 1 and counts["events"] > 12 and counts["api_keys"] == 1
    assert (tmp_path / "anna.zip").stat().st_mode & 0o777 == 0o600
    with zipfile.ZipFile(tmp_path / "anna.zip") as archive:
        texts = {name: archive.read(name).decode() for name in archive.namelist()}
    everything = "".join(texts.values())
    assert str(user.id) not in everything and "of owner" not in everything and "to owner" not in everything
    assert sorted(text for name, text in texts.items() if name.startswith("files/")) == ["of anna", "shared bytes"]
    assert json.loads(texts["data/users.jsonl"])["name"] == "anna"
    hashes = session.execute(select(Base.metadata.tables["api_keys"].c.secret_sha256)).scalars().all()
    assert not any(found in everything for found in hashes)
    with transaction() as other, pytest.raises(Conflict, match="exists"):
        personal_data.export(other, anna, tmp_path / "anna.zip")
    with transaction() as other, pytest.raises(NotFound, match="bert"):
        personal_data.find(other, "bert")


def test_removal_leaves_nothing_of_one_and_all_of_the_other(anna, user, session, data_dir):
    key, job = str(anna.id), session.scalars(select(Job).where(Job.owner_id == anna.id)).one()
    folder, shas = data_dir / "runs" / str(job.id), {row.filename: row.sha256 for row in session.scalars(select(File))}
    with transaction() as other:
        removed = personal_data.remove(other, other.get_one(User, anna.id))
    assert removed["users"] == 1 and removed["events"] > 12
    session.expire_all()
    for table in Base.metadata.sorted_tables:
        for row in session.execute(select(table)).mappings():
            assert key not in json.dumps(dict(row), default=str) and "anna" not in json.dumps(dict(row), default=str), table.name
    assert not folder.exists() and not files.blob_path(shas["anna.txt"]).exists()
    assert files.blob_path(shas["shared.txt"]).exists() and files.blob_path(shas["owner.txt"]).exists()
    for table, count in (("jobs", 1), ("files", 2), ("answers", 1), ("api_keys", 1), ("users", 1)):
        assert session.scalar(select(func.count()).select_from(Base.metadata.tables[table])) == count, table


def test_who_has_something_running_is_not_removed(anna, session, user, tiny_registered):
    lives.Life(session, lives.order(session, anna, tiny_registered, name="running")).claim()
    with pytest.raises(Conflict, match="running"), transaction() as other:
        personal_data.remove(other, other.get_one(User, anna.id))
    assert session.get(User, anna.id) is not None


def test_what_another_person_uses_is_named(anna, session, user):
    """As a file of one that a dataset of the other was made from, once things are shared."""
    shared = session.scalars(select(File.id).where(File.owner_id == anna.id)).first()
    other_job = session.scalars(select(Job).where(Job.owner_id == user.id)).one()
    other_job.result_file_id = shared
    session.commit()
    with pytest.raises(Conflict, match="used by another person"), transaction() as other:
        personal_data.remove(other, other.get_one(User, anna.id))
    assert session.get(User, anna.id) is not None
