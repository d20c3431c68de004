"""The registry of launchers: the folder itself. A file here that defines a `Launcher` may be named in LUTHIER_LAUNCHER; files that begin
with an underscore hold what several share. `_base.py` says what a launcher is.
"""

from __future__ import annotations

import functools

from app.errors import BadField
from app.kit.registry import classes_in
from app.settings import get_settings
from worker.launchers._base import Launcher

__all__ = ["LAUNCHERS", "Launcher", "current"]

LAUNCHERS: dict[str, type[Launcher]] = {cls.name: cls for cls in classes_in(__name__, Launcher)}
"""Every launcher by its name."""


def current() -> Launcher:
    """The launcher of this worker. Raises BadField for a name that there is none of, and for settings that it needs."""
    return _made(get_settings().launcher)


@functools.cache
def _made(name: str) -> Launcher:
    if name not in LAUNCHERS:
        raise BadField(f"LUTHIER_LAUNCHER={name[:60]} is no launcher.", hint=f"Use one of {', '.join(LAUNCHERS)}.", param="launcher")
    return LAUNCHERS[name]()
