"""Writes the exact versions of everything this environment has that the project needs: `python -m tests.constraints > constraints.txt`.
With `--oldest` the oldest of torch, transformers and peft that are allowed, for `make test-oldest`.

To be run in the environment of `make test-all`, once every test has passed there.
"""

from __future__ import annotations

import re
import sys
import tomllib
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

from app.settings import PROJECT

EXTRAS = ("embedded", "gpu", "export", "onnx", "oidc", "otel", "test")


def required() -> list[Requirement]:
    """What pyproject.toml asks for, here, with the extras that the tests need."""
    project = tomllib.loads((PROJECT / "pyproject.toml").read_text())["project"]
    lines = project["dependencies"] + [line for extra in EXTRAS for line in project["optional-dependencies"][extra]]
    return [found for found in map(Requirement, lines) if found.marker is None or found.marker.evaluate()]


def installed(wanted: list[Requirement]) -> Iterator[tuple[str, Version]]:
    """Name and version of what is wanted and of all that it needs in turn."""
    seen: set[tuple[str, str]] = set()
    waiting = [(canonicalize_name(one.name), extra) for one in wanted for extra in ("", *one.extras)]
    while waiting:
        name, extra = waiting.pop()
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        found = metadata.distribution(name)
        if not extra:
            yield name, Version(found.version)
        for line in found.requires or []:
            need = Requirement(line)
            applies = need.marker.evaluate({"extra": extra}) if need.marker else not extra
            # a marker that does not speak of the extra was followed without it already, which costs nothing
            if applies:
                waiting += [(canonicalize_name(need.name), each) for each in ("", *need.extras)]


def lines() -> list[str]:
    """`name==version`, sorted. The build of a version (`+cpu`) is left out: pip takes the one that is offered."""
    return sorted(f"{name}=={version.public}" for name, version in installed(required()))


OLDEST = ("torch", "transformers", "peft")
"""What training is written against."""


def oldest() -> list[str]:
    """The lowest versions of `OLDEST` that pyproject.toml allows, as `name==version.*`, with their patch releases."""
    found = []
    for one in required():
        if one.name in OLDEST:
            (least,) = (each.version for each in one.specifier if each.operator == ">=")
            found.append(f"{one.name}=={least}.*")
    return found


def read(text: str) -> dict[str, Version]:
    """The versions of a file of constraints. Raises AssertionError for a line that is anything but `name==version` or a comment."""
    found: dict[str, Version] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.fullmatch(r"([a-z0-9-]+)==([0-9][0-9a-z.!]*)", line)
            assert match, f"no constraint: {line!r}"
            found[match[1]] = Version(match[2])
    return found


if __name__ == "__main__" and sys.argv[1:] == ["--oldest"]:
    print("\n".join(oldest()))
elif __name__ == "__main__":
    print("# Versions that every test passed with on Linux x86-64 and Python 3.11, written by `python -m tests.constraints`.")
    print("\n".join(lines()))
