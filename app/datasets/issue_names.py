"""Titles of issues for people; the API and the database use the rule's name."""

from __future__ import annotations

from typing import Any

from app.languages import gettext, mark

CONFLICTS = ("other_label", "other_answer", "opposite_verdict")
"""Rules about conflicting rows: which one is right is a person's choice (`app/datasets/conflicts.py`)."""
WHOLE = ("few_rows", "one_class")
"""Rules about the dataset as a whole."""
LENGTHS = ("over_long", "nothing_left")
"""Rules about rows that a larger max sequence length of the job would not truncate."""
CHOOSE = "choose"
TITLES = {
    "bom": mark("byte-order mark"),
    "wrong_role": mark("invalid role"),
    "wrong_role_order": mark("invalid role order"),
    "other_answer": mark("conflicting answers"),
    "other_label": mark("conflicting labels"),
    "opposite_verdict": mark("conflicting preferences"),
    "nothing_left": mark("no trainable tokens"),
    "over_long": mark("truncated"),
    "label_variants": mark("label variants"),
    "rare_label": mark("rare class"),
    "few_rows": mark("too few rows"),
    "one_class": mark("single class"),
    "no_label": mark("missing label"),
    "label_noise": mark("likely mislabeled"),
    "invalid_json": mark("invalid JSON"),
    "not_utf8": mark("not UTF-8"),
    "bad_quotes": mark("bad quotes"),
    "control_character": mark("control character"),
    "duplicate": mark("duplicate"),
    "duplicate_key": mark("duplicate key"),
    "empty": mark("empty"),
    "empty_answer": mark("empty answer"),
    "json_array": mark("json array"),
    "line_too_long": mark("line too long"),
    "lone_surrogate": mark("lone surrogate"),
    "missing_field": mark("missing field"),
    "mixed_languages": mark("mixed languages"),
    "near_duplicate": mark("near duplicate"),
    "no_answer": mark("no answer"),
    "not_a_number": mark("not a number"),
    "not_looked_at": mark("not looked at"),
    "not_text": mark("not text"),
    "nothing_to_learn": mark("no trainable tokens"),
    "nul": mark("nul"),
    "open_quote": mark("open quote"),
    "other_language": mark("other language"),
    "other_sheets": mark("other sheets"),
    "personal_data": mark("personal data"),
    "ragged": mark("ragged"),
    "same_answers": mark("same answers"),
    "secret": mark("secret"),
    "several_files": mark("several files"),
    "template_marker": mark("template marker"),
    "template_refuses": mark("template refuses"),
    "title_rows": mark("title rows"),
    "too_deep": mark("too deep"),
    "unknown_key": mark("unknown key"),
    "utf_16": mark("utf 16"),
    "wrong_label": mark("wrong label"),
    "wrong_shape": mark("wrong shape"),
    "wrong_weight": mark("wrong weight"),
}
FIXES = (
    mark("Remove row"),
    mark("Remove it"),
    mark("Redact"),
    mark("Compare rows"),
    mark("Repair the line"),
    mark("Keep the last of them"),
    mark("Replace with null"),
    mark("Put � there"),
    mark("Read the line as Windows-1252"),
    mark("Change to “user”"),
    mark("Change to “assistant”"),
    mark("Change to “system”"),
    mark("Change to “tool”"),
    mark("Move it to the front"),
    mark("Join the two"),
    mark("Drop this message"),
    mark("Drop the last message"),
    mark("Remove the weight"),
)
"""Labels of fixes. They are stored with the issues in English, and a page translates them."""


def title(rule: str) -> str:
    """The title of a rule, in the language of the page."""
    return gettext(TITLES.get(rule, rule.replace("_", " ")))


def choice(line: int) -> dict[str, Any]:
    """The fix of a row that conflicts with the one at `line`."""
    return {"label": "Compare rows", "operation": CHOOSE, "arguments": {"line": line}}
