"""Random secrets of a studio, each in a file of its own: in `secrets/` of the data folder, or in the folder that LUTHIER_SECRETS_DIR
names, which is then given from outside and the same for all processes."""

from __future__ import annotations

import contextlib
import os
import secrets
from functools import cache
from pathlib import Path

from app.errors import Unavailable
from app.settings import get_settings

NAMES = ("session", "two_step", "webhooks")
"""What is signed with them: cookies and forms; one-time codes; webhooks."""
MIN_BYTES = 32


def folder() -> Path:
    """Where the secrets are."""
    return get_settings().secrets_dir or get_settings().folder("secrets")


def are_given() -> bool:
    """Whether they come from outside, so that nothing is written to their folder."""
    return get_settings().secrets_dir is not None


def check() -> None:
    """At the start of a web process: secrets that are given are all there. Raises Unavailable."""
    if are_given():
        for name in NAMES:
            secret(name)


def is_here(name: str) -> bool:
    """Whether this machine has the secret already, as opposed to one that another machine of the studio made."""
    return (folder() / f"{name}.key").exists()


@cache
def secret(name: str = "session") -> bytes:
    """A random secret of this studio, created at the first start and readable by its owner alone (0600). Raises Unavailable for one
    that is to be given and is not, or is too short."""
    path = folder() / f"{name}.key"
    if are_given():
        return _given(path)
    if not path.exists():
        # Two processes may start at once: each writes a draft, and only one of them gets the name.
        draft = path.with_suffix(f".{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(MIN_BYTES))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()


def _given(path: Path) -> bytes:
    try:
        found = path.read_bytes()
    except OSError as error:
        raise Unavailable(
            f"The secret {path} cannot be read ({error.strerror}).",
            hint=f"LUTHIER_SECRETS_DIR must hold {', '.join(f'{name}.key' for name in NAMES)}, the same for every process of the studio.",
        ) from error
    if len(found) < MIN_BYTES:
        raise Unavailable(f"The secret {path} has {len(found)} bytes.", hint=f"Make it of {MIN_BYTES} random bytes or more.")
    return found
