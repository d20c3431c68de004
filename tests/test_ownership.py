"""A person's own objects: another person's, and one that was deleted, is as if it were not there."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

import pytest

from app import ownership
from app.errors import NotFound
from app.kit import ids
from app.ownership import mine, owned
from app.tables import Base, Dataset, Exchange, Prompt, User, Vote
from app.web import projects


@pytest.fixture
def other(session):
    found = User(name=f"other-{uuid.uuid4().hex[:8]}")
    session.add(found)
    session.flush()
    return found


def made(owner):
    said = {"messages": [], "left_model": "a", "right_model": "b", "left_text": "", "right_text": ""}
    return [
        Dataset(owner_id=owner.id, name="a", status="ready"),
        Prompt(owner_id=owner.id, name="a"),
        Vote(owner_id=owner.id, **said),
        Exchange(owner_id=owner.id, sampling={}),
    ]


def test_ones_own_are_found_and_nobody_elses(session, user, other):
    for own, foreign in zip(made(user), made(other), strict=True):
        table = type(own)
        session.add_all([own, foreign])
        session.flush()
        assert owned(session, table, user, own.id) is own
        assert [one.id for one in session.scalars(mine(table, user).where(table.id.in_([own.id, foreign.id])))] == [own.id]
        for key in (foreign.id, uuid.uuid4()):
            with pytest.raises(NotFound, match="No such") as caught:
                owned(session, table, user, key)
            assert caught.value.hint
        with pytest.raises(NotFound):
            owned(session, table, user, own.id, table.id == foreign.id)


def test_what_was_deleted_is_gone_and_what_was_changed_elsewhere_is_seen(session, user):
    dataset = Dataset(owner_id=user.id, name="a", status="ready")
    session.add(dataset)
    session.commit()
    session.execute(Dataset.__table__.update().values(name="b"))
    assert owned(session, Dataset, user, dataset.id).name == "b"
    dataset.deleted_at = datetime.now(UTC)
    with pytest.raises(NotFound) as caught:
        owned(session, Dataset, user, dataset.id)
    assert ids.public(ids.DATASET, dataset.id) in caught.value.message and caught.value.param == "dataset"


def test_every_table_of_a_person_is_known():
    """Models may belong to everyone, and aliases and their moves are found by the name of the alias."""
    of_people = {mapper.class_ for mapper in Base.registry.mappers if "owner_id" in mapper.columns}
    assert {table.__name__ for table in of_people - set(ownership._SHOWN)} == {"Model", "ModelAlias", "AliasMove"}
    assert of_people == set(projects.owned_tables()), "what a person makes belongs to a project"
