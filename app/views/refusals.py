"""What forms say about a choice that is not there any more."""

from __future__ import annotations

from collections.abc import Iterable

from app.kit import ids
from app.languages import gettext
from app.tables import Dataset


def no_model(name: str) -> str:
    return gettext("There is no model %(name)s that is ready. It may have been deleted; choose another.", name=name[:80])


def no_dataset(key: str) -> str:
    return gettext("There is no dataset %(name)s that is ready. It may have been deleted; choose another.", name=key[:80])


def why_not(rows: Iterable[Dataset], wanted: str) -> str:
    """Why the dataset of this public id cannot be chosen."""
    for row in rows:
        if ids.public(ids.DATASET, row.id) == wanted:
            error = (row.error or {}).get("message", gettext("it could not be read"))
            return gettext("%(name)s has an error: %(error)s Its page shows what to do.", name=row.name, error=error)
    return gettext("There is no dataset %(name)s. It may have been deleted; choose another.", name=wanted[:80])
