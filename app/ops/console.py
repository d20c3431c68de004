"""What every command of `luthier` uses: its output, its errors, its options."""

from __future__ import annotations

import contextlib
import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.markup import escape

from app.errors import BadField, StudioError
from app.settings import get_settings

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
