"""The sample datasets that come with the studio; `samples/index.yaml` describes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from sqlalchemy import select
from sqlalchemy.orm import Session, defer

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
    """The newest dataset of this user that was parsed from each sample's file without an error, those without one left out."""
    file = Dataset.origin["filename"].astext
    own = mine(Dataset, user).where(file.in_([sample["file"] for sample in list_()]), Dataset.status != "error")
    newest = own.with_only_columns(Dataset.id).distinct(file).order_by(file, Dataset.created_at.desc(), Dataset.id)
    return list(session.scalars(select(Dataset).where(Dataset.id.in_(newest)).options(defer(Dataset.report))))


def added(rows: Iterable[Dataset], sample: dict[str, Any]) -> Dataset | None:
    """The newest of these datasets that was parsed from the sample's file."""
    return next((one for one in rows if (one.origin or {}).get("filename") == sample["file"]), None)


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
