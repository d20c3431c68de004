"""What people read for the rule of an issue; the API and the database know it by the rule itself."""

from __future__ import annotations

TITLES = {
    "bom": "byte-order mark",
    "wrong_role": "invalid role",
    "wrong_role_order": "invalid role order",
    "other_answer": "conflicting answers",
    "other_label": "conflicting labels",
    "opposite_verdict": "conflicting preferences",
    "nothing_left": "no trainable tokens",
    "over_long": "truncated",
    "rare_label": "rare class",
    "one_class": "single class",
    "no_label": "missing label",
    "label_noise": "likely mislabeled",
    "invalid_json": "invalid JSON",
    "not_utf8": "not UTF-8",
}


def title(rule: str) -> str:
    """A rule in the field's words."""
    return TITLES.get(rule, rule.replace("_", " "))
