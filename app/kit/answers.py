"""What short answers say: the number or the label in a text."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBER = re.compile(r"[-+]?\$?\d[\d,]*(?:\.\d+)?|[-+]?\.\d+")


def number_in(text: str) -> float | None:
    """The last number of a text; thousands separators and a currency sign are ignored."""
    found = NUMBER.findall(text)
    if not found:
        return None
    try:
        return float(found[-1].replace(",", "").replace("$", ""))
    except ValueError:
        return None


def plain(text: str) -> str:
    """Normalized for comparison: case, spaces and a final period do not make an answer wrong."""
    return " ".join(text.casefold().split()).strip(" .!\"'")


def label_in(answer: str, labels: Sequence[str]) -> str:
    """The label that an answer names first; the longer of two at one position. The answer itself when it names none."""
    text = plain(answer)
    found = [(m.start(), -len(label), label) for label in labels if (m := re.search(rf"(?<!\w){re.escape(plain(label))}(?!\w)", text))]
    return min(found)[2] if found else answer
