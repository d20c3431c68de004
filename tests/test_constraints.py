"""`constraints.txt` fits pyproject.toml: each version is in the range that is asked for, and nothing that is asked for has none."""

from __future__ import annotations

import pytest
from packaging.utils import canonicalize_name

from app.settings import PROJECT
from tests import constraints

PINNED = constraints.read((PROJECT / "constraints.txt").read_text())


@pytest.mark.parametrize("wanted", constraints.required(), ids=lambda requirement: requirement.name)
def test_the_range_of_each_dependency_admits_its_version(wanted):
    assert canonicalize_name(wanted.name) in PINNED, "write it anew: python -m tests.constraints > constraints.txt"
    assert wanted.specifier.contains(PINNED[canonicalize_name(wanted.name)], prereleases=True)


def test_what_dependencies_need_is_pinned_too():
    assert {"starlette", "numpy", "kombu", "mako", "llvmlite"} <= PINNED.keys()


@pytest.mark.parametrize(
    "line", ["torch>=2.11", "torch==2.13.0 --index-url https://example.org", "torch @ file:///torch.whl", "-r other.txt"]
)
def test_anything_but_a_version_is_refused(line):
    with pytest.raises(AssertionError):
        constraints.read(line)
