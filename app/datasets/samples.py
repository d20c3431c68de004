"""The sample datasets that come with the studio; `samples/index.yaml` describes them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import yaml
from sqlalchemy import select
from sqlalchemy.orm import Session, defer

from app.datasets import service as datasets
from app.errors import NotFound
from app.languages import gettext, mark
from app.ownership import mine
from app.settings import RESOURCES
from app.storage import files
from app.tables import Dataset, User

FOLDER = RESOURCES / "samples"
SHOWS = (
    mark("Customer support in one voice. After training the model answers briefly and warmly, names the next step and signs off as Ada."),
    mark(
        "A fixed answer format. After training the model explains in one plain sentence and adds a comparison that begins with “Think of”."
    ),
    mark("Log entries in one style. After training the model continues a date and the wind as a dry harbor log."),
    mark("Plain text from a violin workshop. After training the model continues any beginning with its vocabulary and style."),
    mark("Customer questions in six classes, such as delivery, return and payment."),
    mark("Pairs of a direct and an evasive answer. After training the model answers the question at once."),
    mark("Conversations of two turns. After training the model answers in one short sentence and asks a question back."),
    mark("Single answers, each rated good or bad. After training (KTO) the model answers with a number."),
    mark(
        "A model that calls functions. After training it writes the right call with the right arguments, and answers itself "
        "where none is needed. Take the chat template hermes with a model whose own knows no tools."
    ),
    mark(
        "Questions whose answer is one number, so that a grader can check it. Choose the objective Reinforcement learning and "
        "the reward Right number, and watch the share of right answers; or train on the answers, and compare."
    ),
    mark(
        "Arithmetic in a sentence or two, each with its steps and the number after ####. Score prompts on it, with and without "
        "a chain of thought, or train on the steps."
    ),
    mark("Descriptions of a thing in two classes. Rules, frozen features and a prompt all do something; compare them in the reading room."),
    mark(
        "Short notes of a doctor, invented, with the abbreviations that they use. After training the model continues in them; "
        "measure how its loss on general text changes."
    ),
    mark("A word and its opposite. A model that is shown some continues the list; trained on it, it answers with the word alone."),
)
"""`shows` of every sample, for the catalogs of the languages, which do not read YAML."""


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
        names = ", ".join(entry["name"] for entry in list_())
        raise NotFound(gettext("There is no sample “%(name)s”.", name=name[:60]), hint=gettext("There are %(names)s.", names=names))
    here = added(parsed(session, user), sample)
    if here is not None:
        return here
    file = files.add_bytes(session, user, (FOLDER / sample["file"]).read_bytes(), sample["file"], "fine-tune")
    return datasets.create(session, user, file, name=sample["title"])
