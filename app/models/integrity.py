"""Checks that a model's files are those that were registered, before they are used.

The weights that a job, an evaluation, a merge or a download would use are checked against their manifest by the process that
starts the work, before it starts the one that loads them; and again, cheaply, wherever a folder is loaded. This guards against
damage and exchanged files, not against somebody with the studio's own file permissions.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import BadData
from app.kit import manifest
from app.spec import ModelRef
from app.storage import places

log = logging.getLogger(__name__)
Beat = Callable[[], object]


class BadModel(BadData):
    """The model's folder cannot be loaded, or the model does not support what is requested."""

    code = "bad_model"


class Damaged(BadModel):
    """Files of the model are missing, or not those that were registered. `path` is its folder, relative to the data folder."""

    def __init__(self, path: str, message: str) -> None:
        super().__init__(message, hint="Open the model on the page Models and bring it in again; then go on.")
        self.path = path


def check_model(ref: ModelRef, beat: Beat = lambda: None) -> None:
    """Check the folders of the base and of its adapters, all of which the studio registered. `beat` is called regularly while
    files are read. Raises Damaged, naming the file."""
    check(ref.path, ref.name, ref.revision, beat=beat)
    for adapter in ref.adapters:
        check(adapter.path, ref.name, beat=beat)


def check(path: str, name: str, revision: str | None = None, *, may_be_plain: bool = False, beat: Beat = lambda: None) -> None:
    """Check one folder, relative to the data folder; a checkpoint's manifest is in the folder above its weights.

    A folder without a manifest was never registered: `may_be_plain` accepts it, as a person's own folder. Where there is an object
    storage it is brought first, and once more where it is damaged here.
    """
    folder = places.path(path, beat=beat)
    home = next((f for f in (folder, folder.parent) if manifest.read(f) is not None), None)
    if not folder.is_dir():
        raise Damaged(path, f"The folder of {name}, {path}, is gone.")
    if home is None:
        if may_be_plain:
            return
        raise Damaged(path, f"The folder of {name}, {path}, has no manifest, so its files cannot be trusted.")
    try:
        found = _checked(home, path, beat)
    except BadData as error:
        raise Damaged(path, f"The files of {name} are not what was saved. {error.message}") from error
    except OSError as error:
        raise BadModel(f"The files of {name} cannot be read: {error}", hint="Look at the disk, then try again.") from error
    if revision and revision not in (manifest.revision_of(found["files"]), manifest.sha256_of(home / manifest.NAME)):
        raise Damaged(path, f"The files of {name} are not those of revision {revision[:12]}.")


def _checked(home: Path, path: str, beat: Beat) -> dict[str, Any]:
    try:
        return manifest.check(home, beat)
    except BadData:
        if not places.bring_again(path, beat):
            raise
        return manifest.check(home, beat)


def tell(damaged: BadModel) -> None:
    """Mark the model as damaged, which shows on its page and refuses it to new work until it is intact again. A checkpoint has no
    page, and a BadModel for other reasons is ignored."""
    if not isinstance(damaged, Damaged):
        return
    from sqlalchemy import select  # a trainer, which has no database, loads models too
    from sqlalchemy.exc import SQLAlchemyError

    from app.db import transaction
    from app.tables import Model

    try:
        with transaction() as session:
            held = select(Model).where(Model.path == damaged.path, Model.status == "ready", Model.deleted_at.is_(None)).with_for_update()
            for model in session.scalars(held):
                tuned = "Put its folder back from a copy and try again, or fine-tune again."
                hint = tuned if model.job_id else "Try again: it is downloaded or made again. Its fine-tunes stay."
                model.status, model.error = "error", damaged.as_problem() | {"hint": hint}
                log.error("The model %s is damaged: %s", model.name, damaged.message)
    except (SQLAlchemyError, RuntimeError) as error:  # the next process that meets it marks it
        log.warning("That a model is damaged could not be recorded (%s): %s", type(error).__name__, damaged.message)
