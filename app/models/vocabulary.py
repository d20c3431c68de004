"""The vocabulary of a model: where its tokenizer is, which strings are tokens of it, and what a job added. No torch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from app.errors import BadField
from app.events import Finished
from app.shapes import shape_of
from app.spec import ModelRef
from app.storage import places
from app.strategies import STRATEGIES
from app.strategies._files import NEW_TOKENS
from app.tables import JSON, Job


def has_new_tokens(path: str | None) -> bool:
    """Whether the adapter in a folder, relative to the data folder, came with new tokens."""
    return path is not None and places.exists(f"{path}/{NEW_TOKENS}")


def tokenizer_path(ref: ModelRef) -> str:
    """The folder of a model's tokenizer, relative to the data folder: the newest adapter's own, or the base's."""
    own = [adapter.path for adapter in ref.adapters if places.exists(f"{adapter.path}/tokenizer_config.json")]
    return own[-1] if own else ref.path


def refuse_known_tokens(tokens: Sequence[str], ref: ModelRef) -> None:
    """Raises BadField for a new token that the model has, or that contains a special one. A tokenizer in another form than tokenizer.json is
    asked when the job starts."""
    path = places.path(tokenizer_path(ref), weights=False) / "tokenizer.json"
    if not path.is_file():
        return
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    added: list[dict[str, Any]] = found.get("added_tokens") or []
    words = found.get("model", {}).get("vocab") or ()
    known = {word if isinstance(word, str) else word[0] for word in words} | {token["content"] for token in added}
    special = [token["content"] for token in added if token.get("special")]
    for token in tokens:
        reason = f"{ref.name} has a token for “{token}” already." if token in known else None
        if reason is None and (inside := next((one for one in special if one in token), None)):
            reason = f"“{token}” contains the special token {inside}, which would no longer be found."
        if reason:
            raise BadField(reason, hint="Omit it from new_tokens.", param="run.new_tokens", code="token_exists")


def shape_of_result(job: Job, finished: Finished) -> JSON | None:
    """The shape of a whole model that new tokens made larger; None where it is its base's, as an adapter's is."""
    if STRATEGIES[job.spec["strategy"]["name"]].adapter or not job.spec["run"].get("new_tokens"):
        return None
    config = json.loads((places.path(finished.path, weights=False) / "config.json").read_text())
    return shape_of(config).model_dump(mode="json")
