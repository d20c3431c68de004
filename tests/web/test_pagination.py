"""Cursor pages: every object once, in order, whatever the page size."""

from __future__ import annotations

import uuid

import pytest
from sqlalchemy import func, select, text

from app.errors import BadField
from app.tables import Event, File, Job
from app.web.pagination import page


def walk(turn) -> list[str]:
    """All ids, as the OpenAI client walks."""
    found, after = [], None
    while True:
        answer = turn(after)
        found += [item["id"] for item in answer["data"]]
        assert answer["first_id"] == (answer["data"][0]["id"] if answer["data"] else None)
        if not answer["has_more"]:
            return found
        after = answer["last_id"]


@pytest.mark.parametrize("limit", [1, 2, 3, 7, 100])
def test_a_list(limit):
    rows = [{"id": f"x-{number}"} for number in range(7)]
    ids = [row["id"] for row in rows]
    assert walk(lambda after: page(rows, after, limit, "desc")) == ids
    assert walk(lambda after: page(rows, after, limit, "asc")) == ids[::-1]


def test_an_empty_page():
    assert page([]) == {"object": "list", "data": [], "has_more": False, "first_id": None, "last_id": None}


def test_an_unknown_cursor_is_a_wrong_field():
    with pytest.raises(BadField) as wrong:
        page([{"id": "a"}], "b")
    assert wrong.value.param == "after"


def test_a_query_also_where_many_were_made_in_one_moment(session, user):
    moment = session.scalar(select(func.clock_timestamp()))
    for number in range(11):
        session.add(File(owner_id=user.id, sha256="0", bytes=number, filename="f", purpose="fine-tune", created_at=moment))
    session.flush()
    query = select(File).where(File.owner_id == user.id)
    as_json = lambda file: {"id": file.id.hex}  # noqa: E731
    for order in ("desc", "asc"):
        for limit in (1, 4, 11, 50):
            found = walk(lambda after: page(query, after, limit, order, as_json, session=session, key=lambda text: uuid.UUID(hex=text)))  # noqa: B023
            assert len(found) == len(set(found)) == 11
    with pytest.raises(BadField):
        page(query, uuid.uuid4().hex, 5, "desc", as_json, session=session, key=lambda text: uuid.UUID(hex=text))


def test_events_go_by_their_number(session, user):
    assert Event.__table__.c.id.identity is not None and Job.__table__.c.id.identity is None
    session.execute(text("SET session_replication_role = replica"))  # events of a job that is not there are enough here
    job_id = uuid.uuid4()
    session.add_all([Event(job_id=job_id, attempt=1, type="step", data={}) for _ in range(5)])
    session.flush()
    query = select(Event).where(Event.job_id == job_id)
    found = walk(lambda after: page(query, after, 2, "desc", lambda event: {"id": str(event.id)}, session=session, key=int))
    assert [int(number) for number in found] == sorted(map(int, found), reverse=True) and len(found) == 5
