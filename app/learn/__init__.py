"""The reading room: the ideas of an introduction to language models and fine-tuning, each tried in under two minutes. The folder is the
registry: one file per stop. Files that begin with an underscore hold what several stops share.

    found = stop.begin(session, user, typed, visit)     what one click starts: real answers, evaluations or jobs
    stop.look(session, user, visit)                     the result, read from the rows of what was started
"""

from __future__ import annotations

from app.kit.registry import classes_in
from app.learn._base import StartedStop, Stop, StopResult

__all__ = ["STOPS", "StartedStop", "Stop", "StopResult"]

STOPS: dict[str, Stop] = {cls.name: cls() for cls in sorted(classes_in(__name__, Stop), key=lambda cls: cls.place)}
"""Every stop by its name, in the order of the page."""
