"""Random secrets of a studio, each in a file of its own."""

from __future__ import annotations

import contextlib
import os
import secrets
from functools import cache

from app.settings import get_settings


def is_here(name: str) -> bool:
    """Whether this machine has the secret already, as opposed to one that another machine of the studio made."""
    return (get_settings().data_dir / "secrets" / f"{name}.key").exists()


@cache
def secret(name: str = "session") -> bytes:
    """A random secret of this studio, created at the first start and readable by its owner alone (0600)."""
    path = get_settings().folder("secrets") / f"{name}.key"
    if not path.exists():
        # Two processes may start at once: each writes a draft, and only one of them gets the name.
        draft = path.with_suffix(f".{os.getpid()}")
        with open(os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
            file.write(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(draft, path)
        draft.unlink()
    return path.read_bytes()
