"""Every sentence of SECURITY.md that promises something names a test, and the test is there."""

from __future__ import annotations

import re

from tests.conftest import PROJECT

PAGE = (PROJECT / "SECURITY.md").read_text()


def test_each_promise_names_a_test_that_is_there():
    promises = re.findall(r"^- .*$", PAGE, re.MULTILINE)
    assert len(promises) >= 20
    for promise in promises:
        named = re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", promise)
        assert named, f"no test is named: {promise}"
        for file, name in named:
            assert re.search(rf"^(async )?def {name}\(", (PROJECT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
