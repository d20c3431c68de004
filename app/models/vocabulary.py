"""The vocabulary of a model: where its tokenizer is, which strings are tokens of it, and what a job added. No torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from app.errors import BadField
from app.events import Finished
from app.kit.humanize import human_number
from app.languages import gettext
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


def _tokenizer_of(ref: ModelRef) -> dict[str, Any] | None:
    """The contents of a model's tokenizer.json; None where it has none."""
    path = places.path(tokenizer_path(ref), weights=False) / "tokenizer.json"
    return json.loads(path.read_text("utf-8")) if path.is_file() else None


def why_apart(one: ModelRef, other: ModelRef) -> str:
    """Why two models do not have the same tokens under the same numbers; empty where they have."""
    if tokenizer_path(one) == tokenizer_path(other):
        return ""
    found = [_tokenizer_of(ref) for ref in (one, other)]
    if missing := next((ref for ref, read in zip((one, other), found, strict=True) if read is None), None):
        return gettext("%(model)s has no tokenizer.json by which its vocabulary could be compared", model=missing.name)
    counts = [_tokens_of(read) for read in found if read is not None]
    if counts[0] == counts[1]:
        return ""
    same = sum(counts[1].get(token) == number for token, number in counts[0].items())
    return gettext(
        "only %(same)s of the %(all)s tokens of %(model)s have the same number among the %(others)s of %(other)s",
        same=human_number(same),
        all=human_number(len(counts[0])),
        model=one.name,
        others=human_number(len(counts[1])),
        other=other.name,
    )


def _tokens_of(tokenizer: Mapping[str, Any]) -> dict[str, int]:
    words = tokenizer.get("model", {}).get("vocab") or {}
    numbered = words if isinstance(words, dict) else {word[0]: place for place, word in enumerate(words)}
    return {**numbered, **{token["content"]: token["id"] for token in tokenizer.get("added_tokens") or []}}


def refuse_known_tokens(tokens: Sequence[str], ref: ModelRef) -> None:
    """Raises BadField for a new token that the model has, or that contains a special one. A tokenizer in another form than tokenizer.json is
    asked when the job starts."""
    if (found := _tokenizer_of(ref)) is None:
        return
    added: list[dict[str, Any]] = found.get("added_tokens") or []
    words = found.get("model", {}).get("vocab") or ()
    known = {word if isinstance(word, str) else word[0] for word in words} | {token["content"] for token in added}
    special = [token["content"] for token in added if token.get("special")]
    for token in tokens:
        reason = gettext("%(model)s has a token for “%(token)s” already.", model=ref.name, token=token) if token in known else None
        if reason is None and (inside := next((one for one in special if one in token), None)):
            reason = gettext(
                "“%(token)s” contains the special token %(special)s, which would no longer be found.", token=token, special=inside
            )
        if reason:
            raise BadField(reason, hint=gettext("Omit it from new_tokens."), param="run.new_tokens", code="token_exists")


def shape_of_result(job: Job, finished: Finished) -> JSON | None:
    """The shape of a whole model that new tokens made larger; None where it is its base's, as an adapter's is."""
    if STRATEGIES[job.spec["strategy"]["name"]].adapter or not job.spec["run"].get("new_tokens"):
        return None
    config = json.loads((places.path(finished.path, weights=False) / "config.json").read_text())
    return shape_of(config).model_dump(mode="json")
