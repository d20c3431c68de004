"""Calls that read texts and write nothing: embeddings, classification, next tokens. They leave no exchange; their tokens are counted here."""

from __future__ import annotations

from collections.abc import Sequence

from app import limits
from app.db import transaction
from app.inference.protocol import Done, Entry
from app.tables import User


def count(user: User, heard: Sequence[Sequence[Entry]], *, encoded: bool) -> None:
    """Count what the requests of one call have read, in a transaction of its own. `encoded`: the texts were embedded or classified, which
    counts against the limit of a day as writing does."""
    read = sum(entry.prompt_tokens for entries in heard for entry in entries if isinstance(entry, Done))
    with transaction() as session:
        limits.count_tokens(session, user.id, user.project_id, read=read, encoded=read if encoded else 0)
