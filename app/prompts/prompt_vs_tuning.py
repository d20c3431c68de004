"""Would a better prompt have been enough? The best prompt and the best fine-tuned model, compared row by row.

Both answered the same rows, so they are compared as pairs: only rows on which one did better count, in an exact sign test
(McNemar's test, where an answer is right or wrong).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import select
from sqlalchemy.orm import Session

from app.kit import stats
from app.languages import gettext, localized, ngettext
from app.tables import Prompt, PromptResult, PromptRun, PromptVersion

FEWEST = 20
"""Minimum of shared rows for a conclusion."""

Row = tuple[PromptRun, Prompt, PromptVersion]


class Paired(NamedTuple):
    """Two runs on the rows that both answered: how many, their mean scores there, and on how many which did better."""

    lines: int
    tuned: float
    prompt: float
    tuned_better: int
    prompt_better: int

    @property
    def p(self) -> float:
        return stats.sign_test(self.tuned_better, self.prompt_better)


def verdict(session: Session, rows: Sequence[Row]) -> str:
    """The conclusion in a sentence or two, from the finished runs on one dataset, best first."""
    done = [row for row in rows if row[0].status == "succeeded" and (row[0].result or {}).get("rows")]
    tuned = next((row for row in done if is_tuned(row[0]) and row[0].spec["part"] == "validation"), None)
    plain = [row for row in done if not is_tuned(row[0])]
    if tuned is None or not plain:
        return gettext(
            "Run a prompt on a base model and on a fine-tuned one, on the validation set, to see whether prompting is sufficient."
        )
    rule = tuned[0].spec["body"]["score"]
    prompt = next((row for row in plain if row[0].spec["body"]["score"] == rule), None)
    if prompt is None:
        return gettext("The fine-tuned models and the prompts were scored with different metrics, so they cannot be compared.")
    found = paired(session, tuned[0], prompt[0])
    if found.lines < FEWEST:
        return ngettext(
            "Only %(num)s rows were run with both the best prompt and the best fine-tuned model. "
            "Run them together, on rows that neither was trained on.",
            "Only %(num)s rows were run with both the best prompt and the best fine-tuned model. "
            "Run them together, on rows that neither was trained on.",
            found.lines,
        )
    return _in_words(found, tuned[0].spec["model"]["name"], prompt[1].name, prompt[0].spec["model"]["name"])


def _in_words(found: Paired, tuned: str, prompt: str, base: str) -> str:
    """`prompt` was run on the model `base`."""
    values = {
        "rows": found.lines, "tuned": tuned, "score": localized(f"{found.tuned:.1%}"), "prompt": prompt, "base": base,
        "other": localized(f"{found.prompt:.1%}"), "better": found.tuned_better, "worse": found.prompt_better,
        "p": localized(f"{max(found.p, 1e-4):.2g}"),
    }  # fmt: skip
    if found.p >= stats.SURE:
        return gettext(
            "Prompting may be sufficient. On the %(rows)s rows of both, %(tuned)s scores %(score)s and “%(prompt)s” on %(base)s %(other)s; it is "
            "ahead on %(better)s rows and behind on %(worse)s: no significant difference (exact paired test, p = %(p)s). More rows would tell.",
            **values,
        )
    if found.tuned_better > found.prompt_better:
        return gettext(
            "Fine-tuning was needed. On the %(rows)s rows of both, %(tuned)s scores %(score)s and “%(prompt)s” on %(base)s %(other)s; it is "
            "ahead on %(better)s rows and behind on %(worse)s, a significant difference (exact paired test, p = %(p)s).",
            **values,
        )
    return gettext(
        "Prompting is sufficient. On the %(rows)s rows of both, %(tuned)s scores %(score)s and “%(prompt)s” on %(base)s %(other)s; the "
        "fine-tuned model is ahead on %(better)s rows and behind on %(worse)s (exact paired test, p = %(p)s).",
        **values,
    )


def paired(session: Session, tuned: PromptRun, prompt: PromptRun) -> Paired:
    one, other = (_scores(session, run) for run in (tuned, prompt))
    pairs = [(score, other[line]) for line, score in one.items() if line in other]
    lines = len(pairs)
    mean, other_mean = (sum(side) / lines for side in zip(*pairs, strict=True)) if pairs else (0.0, 0.0)
    return Paired(lines, mean, other_mean, sum(a > b for a, b in pairs), sum(a < b for a, b in pairs))


def _scores(session: Session, run: PromptRun) -> dict[int, float]:
    found = session.execute(select(PromptResult.line, PromptResult.score).where(PromptResult.run_id == run.id))
    return {line: score for line, score in found}


def is_tuned(run: PromptRun) -> bool:
    return bool(run.spec["model"]["adapters"]) or run.spec["model"]["name"].startswith("ft:")
