"""Titles of issues for people; the API and the database use the rule's name."""

from __future__ import annotations

from typing import Any

CONFLICTS = ("other_label", "other_answer", "opposite_verdict")
"""Rules about conflicting rows: which one is right is a person's choice (`app/datasets/conflicts.py`)."""
WHOLE = ("few_rows", "one_class")
"""Rules about the dataset as a whole."""
LENGTHS = ("over_long", "nothing_left")
"""Rules about rows that a larger max sequence length of the job would not truncate."""
CHOOSE = "choose"
TITLES = {
    "bom": "byte-order mark",
    "wrong_role": "invalid role",
    "wrong_role_order": "invalid role order",
    "other_answer": "conflicting answers",
    "other_label": "conflicting labels",
    "opposite_verdict": "conflicting preferences",
    "nothing_left": "no trainable tokens",
    "over_long": "truncated",
    "label_variants": "label variants",
    "rare_label": "rare class",
    "few_rows": "too few rows",
    "one_class": "single class",
    "no_label": "missing label",
    "label_noise": "likely mislabeled",
    "invalid_json": "invalid JSON",
    "not_utf8": "not UTF-8",
}


def title(rule: str) -> str:
    """The title of a rule."""
    return TITLES.get(rule, rule.replace("_", " "))


def choice(line: int) -> dict[str, Any]:
    """The fix of a row that conflicts with the one at `line`."""
    return {"label": "Compare rows", "operation": CHOOSE, "arguments": {"line": line}}
