"""What the states of jobs, models and exports are called within a sentence; a pill of `templates/parts/ui.html` has them as titles."""

from __future__ import annotations

from app.languages import gettext, mark

_WORDS = {
    "queued": mark("queued"),
    "running": mark("running"),
    "paused": mark("paused"),
    "succeeded": mark("succeeded"),
    "failed": mark("failed"),
    "cancelled": mark("cancelled"),
    "fetching": mark("fetching"),
    "ready": mark("ready"),
    "error": mark("error"),
    "reading": mark("reading"),
}


def state_word(status: str) -> str:
    """`The job is %(status)s`: the status as the sentence needs it."""
    return gettext(_WORDS.get(status, status))
