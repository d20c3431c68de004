"""Plain text to spell by: what the samples say, without their questions' form."""

from __future__ import annotations

import json

from sqlalchemy.orm import Session

from app.datasets import samples
from app.datasets import service as datasets
from app.ownership import mine
from app.storage import files
from app.tables import Dataset, User

NAME = "samples-as-text.txt"
TITLE = "Texts of the samples"


def dataset(session: Session, user: User) -> Dataset:
    """The texts as a dataset of this person's project: the one that is there, or a new one, which is read in the background."""
    here = mine(Dataset, user).where(Dataset.origin["filename"].astext == NAME, Dataset.status != "error")
    found = session.scalar(here.order_by(Dataset.created_at.desc()).limit(1))
    if found is not None:
        return found
    file = files.add_bytes(session, user, text().encode(), NAME, "fine-tune")
    return datasets.create(session, user, file, name=TITLE)


def text() -> str:
    """Answers of three samples as paragraphs, about 50,000 characters."""
    found: list[str] = []
    for name in ("support-replies.jsonl", "bench-talk.jsonl", "plain-explanations.jsonl"):
        for line in (samples.FOLDER / name).read_text(encoding="utf-8").splitlines():
            row = json.loads(line)
            turns = row.get("messages") or row.get("conversations") or [row]
            found += [
                " ".join(str(said).split()) for turn in turns if (said := turn.get("content") or turn.get("value") or turn.get("output"))
            ]
    return "\n\n".join(dict.fromkeys(found)) + "\n"
