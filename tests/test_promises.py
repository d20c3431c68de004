"""Every sentence of SECURITY.md and docs/reliability.md that promises something names a test, and the test is there; so does each fault and
each known attack."""

from __future__ import annotations

import re

import pytest

from tests.conftest import PROJECT


@pytest.mark.parametrize(("page", "least"), [("SECURITY.md", 30), ("docs/reliability.md", 20)])
def test_each_promise_names_a_test_that_is_there(page: str, least: int) -> None:
    promises = re.findall(r"^- .*$", (PROJECT / page).read_text(), re.MULTILINE)
    assert len(promises) >= least
    for promise in promises:
        named = named_in(promise)
        assert named, f"no test is named: {promise}"
        for file, name in named:
            assert re.search(rf"^(async )?def {name}\(", (PROJECT / file).read_text(), re.MULTILINE), f"{file} has no {name}"


@pytest.mark.parametrize("number", range(1, 13))
def test_each_fault_names_its_tests(number: int) -> None:
    (row,) = re.findall(rf"^\| F{number} \|.*$", (PROJECT / "docs/reliability.md").read_text(), re.MULTILINE)
    _, _, _, short, long, _ = row.split("|")
    assert named_in(short), "no short form"
    for file, name in named_in(short) + named_in(long):
        assert re.search(rf"^def {name}\(", (PROJECT / file).read_text(), re.MULTILINE), f"{file} has no {name}"
    for file, _ in named_in(long):
        assert "pytest.mark.fault" in (PROJECT / file).read_text(), f"{file} has no long form"


@pytest.mark.parametrize("number", range(1, 21))
def test_each_known_attack_names_its_tests(number: int) -> None:
    (row,) = re.findall(rf"^\| S{number} \|.*$", (PROJECT / "docs/security.md").read_text(), re.MULTILINE)
    named = named_in(row)
    assert named, "no test is named"
    for file, name in named:
        assert re.search(rf"^(async )?def {name}\(", (PROJECT / file).read_text(), re.MULTILINE), f"{file} has no {name}"


def named_in(text: str) -> list[tuple[str, str]]:
    return re.findall(r"`(tests/[\w/]+\.py)::(\w+)`", text)
