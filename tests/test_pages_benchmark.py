"""The benchmark of pages knows every page of the studio, and each of its examples can be opened."""

from __future__ import annotations

import pytest

from benchmarks.pages import as_text, pages, seed
from tests.data_worker import data_worker


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
        {"page": "/a", "milliseconds": 2.0, "bytes": 1200, "violations": []},
        {"page": "/b", "milliseconds": 30.4, "bytes": 90, "violations": ["label (dark): <input>"]},
    ]
    lines = as_text(rows).splitlines()
    assert lines[2:] == ["| `/b` | 30 | 90 | 1 |", "| `/a` | 2 | 1,200 | 0 |", "", "/b: label (dark): <input>"]
