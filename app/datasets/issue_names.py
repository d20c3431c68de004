"""What people read for the rule of an issue; the API and the database know it by the rule itself."""

from __future__ import annotations

from typing import Any

CONFLICTS = ("other_label", "other_answer", "opposite_verdict")
"""Rules under which rows contradict each other: which one is right is a person's choice (`app/datasets/conflicts.py`)."""
WHOLE = ("few_rows", "one_class")
"""Rules about all rows together."""
LENGTHS = ("over_long", "nothing_left")
"""Rules about rows that a longer limit of the job would keep whole."""
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
    """A rule in the field's words."""
    return TITLES.get(rule, rule.replace("_", " "))


def choice(line: int) -> dict[str, Any]:
    """The fix of a row that contradicts the one at `line`."""
    return {"label": "Compare rows", "operation": CHOOSE, "arguments": {"line": line}}
