"""The benchmark of pages knows every page of the studio, and each of its examples can be opened."""

from __future__ import annotations

import pytest
from sqlalchemy import func, select

from app.kit import ids
from app.tables import Event, Job
from benchmarks.pages import as_text, pages, seed
from benchmarks.servers import tiny_model
from tests.data_worker import data_worker
from tests.factories import make_dataset, make_job


@pytest.mark.long
def test_every_page_has_an_example_that_opens(client, session, user, data_dir):
    samples = seed(session, user, data_dir)
    with data_worker():
        for page in pages(samples):
            answer = client.get(page.path)
            assert (answer.status_code, answer.headers["content-type"]) == (200, "text/html; charset=utf-8"), page
    del samples["/jobs/{job_id}"]
    with pytest.raises(SystemExit, match="No example of /jobs/"):
        pages(samples)


def test_the_slowest_page_is_first_and_what_was_found_is_named():
    rows = [
        {"page": "/a", "milliseconds": 2.0, "p95": 3.0, "bytes": 1200, "violations": []},
        {"page": "/b", "milliseconds": 30.4, "p95": 41.0, "bytes": 90, "violations": ["label (dark): <input>"]},
    ]
    lines = as_text(rows).splitlines()
    assert lines[2:] == ["| `/b` | 30 | 41 | 90 | 1 |", "| `/a` | 2 | 3 | 1,200 | 0 |", "", "/b: label (dark): <input>"]


def test_copies_of_a_job_are_as_it_is(session, user, data_dir, client):
    from benchmarks.pages import crowded
    from tests.lives import Life, started, steps

    life = Life(session, make_job(session, user, tiny_model(data_dir, session), make_dataset(session, user, data_dir))).claim()
    life.say(started(24), *steps(1, 24, 24)).finish(24)
    names = {"finished": ids.public(ids.JOB, life.job_id)}
    crowded(session, names, jobs=30, points=600)
    assert session.scalar(select(func.count()).select_from(Job)) == 31
    page = client.get(f"/jobs/{names['one of many']}?tab=metrics")
    assert page.status_code == 200 and "copy 1" in page.text
    kinds = dict(
        session.execute(
            select(Event.type, func.count()).where(Event.job_id == ids.parse(ids.JOB, names["one of many"])).group_by(Event.type)
        ).all()
    )
    assert kinds["step"] == 20 and kinds["started"] == kinds["finished"] == 1 and kinds["evaluated"] >= 1
