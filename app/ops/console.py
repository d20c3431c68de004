"""What commands share: how they print, choose a studio and run something as its owner."""

from __future__ import annotations

import contextlib
import functools
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Protocol, TypeVar

import typer
from rich.console import Console
from rich.markup import escape

from app.errors import BadField, StudioError
from app.settings import get_settings

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

    from app.tables import User

T = TypeVar("T")

out = Console(highlight=False, soft_wrap=True)
err = Console(stderr=True, highlight=False, soft_wrap=True)

DataDir = Annotated[Path | None, typer.Option("--data-dir", help="Folder of the database, files, models and runs.")]


def plainly(command: Callable[..., Any]) -> Callable[..., Any]:
    """Print a StudioError as two sentences, the message and the hint, with exit code 1 and no traceback."""

    @functools.wraps(command)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return command(*args, **kwargs)
        except StudioError as error:
            err.print(f"[bold red]Error:[/] {escape(error.message)}")
            if error.hint:
                err.print(escape(error.hint))
            raise typer.Exit(1) from None

    return run


def choose(**variables: object) -> None:
    """Put options of a command into the environment, which the processes it starts inherit."""
    for name, value in variables.items():
        if value is not None:
            os.environ[f"LUTHIER_{name.upper()}"] = str(value)
    get_settings.cache_clear()
    from pydantic import ValidationError

    try:
        get_settings()
    except ValidationError as error:
        first = error.errors()[0]
        name = f"LUTHIER_{str(first['loc'][0]).upper()}"
        raise BadField(f"{name} cannot be {first['input']!r}.", hint=f"{first['msg']}.", param=name) from None


def say(text: str) -> None:
    """Print a line for the person at the console; plain print, so that a link is never wrapped. A console that cannot be written
    to, as a file on a full disk, is no reason to stop."""
    with contextlib.suppress(OSError):
        print(text, flush=True)


def here_address() -> str:
    """The address of the studio of this data folder."""
    from app.ops.embedded.places import Lock
    from app.ops.embedded.up import studio_url

    holder = Lock(get_settings().data_dir).holder() or {}
    return holder.get("url") or studio_url(get_settings())


class ConsoleRun(Protocol):
    def __call__(self, action: Callable[[Session, User], T], /) -> T: ...


class owner_session:
    """The studio's database for one command; yields `run`, which runs one function as the studio's owner in one transaction."""

    def __enter__(self) -> ConsoleRun:
        from app.ops.embedded.up import beside
        from app.web import audit

        self.studio = contextlib.ExitStack()
        self.studio.enter_context(beside())
        self.studio.enter_context(audit.at_the_console(" ".join(word for word in sys.argv[1:3] if not word.startswith("-"))))
        return self.run

    def __exit__(self, *error: Any) -> None:
        self.studio.__exit__(*error)

    @staticmethod
    def run(action: Callable[[Session, User], T]) -> T:
        from app.db import transaction
        from app.web.auth import first_user

        with transaction() as session:
            return action(session, first_user(session))


def as_owner(action: Callable[[Session, User], T]) -> T:
    with owner_session() as run:
        return run(action)
