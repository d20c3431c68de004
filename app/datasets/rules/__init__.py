"""Rules that compare many rows: the folder is the registry. One file per rule, one class per file.

A rule sees every valid row in one pass and may keep a little of each; what it can know only at the end it reports then.
"""

from __future__ import annotations

from app.datasets.rules._base import Rule, Seen
from app.kit.registry import classes_in

__all__ = ["RULES", "Rule", "Seen"]


RULES: list[type[Rule]] = classes_in(__name__, Rule)
"""Every rule of this folder, by file name."""
