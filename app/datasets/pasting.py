"""Pasted tables: stored as a file like an upload, of the type that its first line looks like."""

from __future__ import annotations

import json

from sqlalchemy.orm import Session

from app.datasets import service as datasets
from app.errors import BadField, TooLarge
from app.kit.humanize import human_number
from app.languages import gettext
from app.storage import files
from app.tables import Dataset, User

MAX_CHARACTERS = 5_000_000


def paste(session: Session, user: User, text: str, name: str | None = None) -> Dataset:
    """A dataset of pasted rows: cells of a spreadsheet, CSV or JSON. Raises BadField for what is no table, TooLarge beyond the limit."""
    text = text.replace("\r\n", "\n").strip("\n")
    if len(text) > MAX_CHARACTERS:
        said = gettext("The pasted text is longer than %(most)s characters.", most=human_number(MAX_CHARACTERS))
        raise TooLarge(said, hint=gettext("Upload it as a file."), param="text")
    extension = extension_of(text)
    if not text.strip() or (extension in (".tsv", ".csv") and "\n" not in text):
        said = gettext("A table needs column names and at least one row.")
        raise BadField(said, hint=gettext("Paste both, each row on its own line."), param="text")
    title = (name or "").strip() or "Pasted table"
    file = files.add_bytes(session, user, text.encode("utf-8", "replace"), f"pasted{extension}", "fine-tune")
    return datasets.create(session, user, file, title)


def extension_of(text: str) -> str:
    """The file type of pasted text: JSON by its bracket, else a table by the delimiter of its header."""
    first = text.lstrip().split("\n", 1)[0]
    if first[:1] in ("{", "["):
        try:
            return ".jsonl" if isinstance(json.loads(first), dict) else ".json"
        except (ValueError, RecursionError):
            return ".json"
    return ".csv" if "\t" not in first and any(mark in first for mark in ",;|") else ".tsv"
