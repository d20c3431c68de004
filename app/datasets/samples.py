"""The sample datasets that come with the studio; `samples/index.yaml` describes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from sqlalchemy.orm import Session

from app.datasets import service as datasets
from app.errors import NotFound
from app.ownership import mine
from app.settings import RESOURCES
from app.storage import files
from app.tables import Dataset, User

FOLDER = RESOURCES / "samples"


def list_() -> list[dict[str, Any]]:
    """Every sample: name, file, title, format, rows, shows, and validation prompts where there are some."""
    found: list[dict[str, Any]] = yaml.safe_load((FOLDER / "index.yaml").read_text(encoding="utf-8"))["samples"]
    return found


def parsed(session: Session, user: User) -> list[Dataset]:
    """The datasets of this user that were parsed from a sample's file, newest first."""
    own = mine(Dataset, user).where(Dataset.origin["filename"].astext.in_([sample["file"] for sample in list_()]))
    return list(session.scalars(own.order_by(Dataset.created_at.desc(), Dataset.id)))


def added(rows: Iterable[Dataset], sample: dict[str, Any]) -> Dataset | None:
    """The newest of these datasets that was parsed from the sample's file."""
    return next((one for one in rows if (one.origin or {}).get("filename") == sample["file"] and one.status != "error"), None)


def add(session: Session, user: User, name: str) -> Dataset:
    """A sample as a dataset of this user: the existing one, or a new one. Raises NotFound for a name that is not in the index."""
    sample = next((sample for sample in list_() if sample["name"] == name), None)
    if sample is None:
        raise NotFound(f"There is no sample “{name[:60]}”.", hint=f"There are {', '.join(entry['name'] for entry in list_())}.")
    here = added(parsed(session, user), sample)
    if here is not None:
        return here
    file = files.add_bytes(session, user, (FOLDER / sample["file"]).read_bytes(), sample["file"], "fine-tune")
    return datasets.create(session, user, file, name=sample["title"])
