"""Every sentence of SECURITY.md and docs/reliability.md that promises something names a test, and the test is there."""

from __future__ import annotations

import re

import pytest

from tests.conftest import PROJECT


@pytest.mark.parametrize(("page", "least"), [("SECURITY.md", 30), ("docs/reliability.md", 20)])
def test_each_promise_names_a_test_that_is_there(page: str, least: int) -> None:
    promises = re.findall(r"^- .*$", (PROJECT / page).read_text(), re.MULTILINE)
    assert len(promises) >= least
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
        assert named, f"no test is named: {promise}"
        for file, name in named:
            assert re.search(rf"^(async )?def {name}\(", (PROJECT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
