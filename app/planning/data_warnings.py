"""What a person is warned about before a job is created: it trains, but may not be what was meant. Read off the datasets' reports."""

from __future__ import annotations

from typing import Any

from app.kit.humanize import human_number
from app.languages import gettext, ngettext
from app.objectives import OBJECTIVES
from app.planning.feasibility import labels_of, longest_row, named
from app.planning.schedule import MIN_STEPS
from app.spec import JobSpec
from app.tables import Dataset


def warnings(spec: JobSpec, dataset: Dataset, validation: Dataset | None = None) -> list[str]:
    """Warnings about the data, each a sentence with its hint."""
    found = [*_left_out(dataset), *_too_long(spec, dataset)]
    if OBJECTIVES[spec.task].classifies:
        found += _odd_labels(dataset)
    if validation is not None:
        told = (*_left_out(validation), *_too_long(spec, validation))
        found += [gettext("Validation dataset: %(warning)s", warning=text) for text in told]
    return found


def later_failed(dataset: Dataset, later: Dataset | None) -> list[str]:
    """A warning that a newer version of the same file failed to parse, so that an older one is trained on."""
    if later is None:
        return []
    return [
        gettext(
            "Version %(later)s of %(name)s, read from the same file, failed, so version %(used)s is used. It said: %(said)s "
            "Change its format or columns on its page, or delete it.",
            later=later.version,
            name=later.name,
            used=dataset.version,
            said=(later.error or {}).get("message") or gettext("It has no valid row."),
        )
    ]


def few_steps(spec: JobSpec, steps: int) -> list[str]:
    """A warning that a job ends before it has learned anything. `steps` are those of the estimate."""
    if steps >= MIN_STEPS or type(spec.strategy).recipe == "features":
        return []
    return [
        ngettext(
            "%(num)s optimizer steps are few: most methods have hardly begun to train after %(few)s. Choose a longer preset, raise the epochs, "
            "or lower the tokens per batch.",
            "%(num)s optimizer steps are few: most methods have hardly begun to train after %(few)s. Choose a longer preset, raise the epochs, "
            "or lower the tokens per batch.",
            steps,
            few=MIN_STEPS,
        )
    ]


def _left_out(dataset: Dataset) -> list[str]:
    bad = (dataset.rows or 0) - (dataset.good_rows or 0)
    if bad <= 0:
        return []
    values = {"rows": human_number(dataset.rows), "name": dataset.name}
    if empty := _finding(dataset, "empty"):
        return [
            gettext(
                "%(bad)s of %(rows)s rows of %(name)s are excluded, %(empty)s of them because a text is empty. The dataset's report lists each "
                "with its line and a fix.",
                bad=human_number(bad),
                empty=human_number(empty),
                **values,
            )
        ]
    return [
        gettext(
            "%(bad)s of %(rows)s rows of %(name)s are excluded. The dataset's report lists each with its line and a fix.",
            bad=human_number(bad),
            **values,
        )
    ]


def _too_long(spec: JobSpec, dataset: Dataset) -> list[str]:
    """A warning about rows beyond the max sequence length. The counts come from one tokenizer, which need not be this model's, so
    they are rounded."""
    report: dict[str, Any] = dataset.report or {}
    limit = longest_row(spec.run, spec.model.shape) - spec.strategy.virtual_tokens()
    longest = report.get("longest") or report.get("longest_characters", 0) / 4
    if longest <= limit:
        return []
    # Exact for the usual limits: buckets begin at powers of two, so those that begin beyond the limit are certainly longer.
    exact = dict(report.get("rows_cut", []))
    rows = exact.get(limit, sum(count for start, count in report.get("token_lengths", []) if start > limit))
    values = {"name": dataset.name, "longest": human_number(_round(longest)), "limit": human_number(limit)}
    if spec.model.shape.positions <= spec.run.max_length:
        return [_beyond_window(rows, limit in exact, values)]
    return [_beyond_limit(rows, limit in exact, values)]


def _beyond_window(rows: int, exact: bool, values: dict[str, str]) -> str:
    """The warning where the model cannot read more; `exact` says that `rows` is no lower bound."""
    if not rows:
        said = gettext("The longest row of %(name)s has about %(longest)s tokens; the model reads %(limit)s at once.", **values)
    elif exact:
        said = ngettext(
            "The longest row of %(name)s has about %(longest)s tokens; the model reads %(limit)s at once, and %(num)s row is longer than that.",
            "The longest row of %(name)s has about %(longest)s tokens; the model reads %(limit)s at once, and %(num)s rows are longer than that.",
            rows, **values,
        )  # fmt: skip
    else:
        said = ngettext(
            "The longest row of %(name)s has about %(longest)s tokens; the model reads %(limit)s at once, and at least %(num)s row is longer "
            "than that.",
            "The longest row of %(name)s has about %(longest)s tokens; the model reads %(limit)s at once, and at least %(num)s rows are longer "
            "than that.",
            rows, **values,
        )  # fmt: skip
    hint = gettext("They are truncated. Split long texts into several rows, or take a model with a longer window.")
    return f"{said} {hint}"


def _beyond_limit(rows: int, exact: bool, values: dict[str, str]) -> str:
    """The same where the job's own setting is the limit."""
    if not rows:
        said = gettext("The longest row of %(name)s has about %(longest)s tokens; this job truncates rows to %(limit)s.", **values)
    elif exact:
        said = ngettext(
            "The longest row of %(name)s has about %(longest)s tokens; this job truncates rows to %(limit)s, and %(num)s row is longer than that.",
            "The longest row of %(name)s has about %(longest)s tokens; this job truncates rows to %(limit)s, and %(num)s rows are longer than that.",
            rows, **values,
        )  # fmt: skip
    else:
        said = ngettext(
            "The longest row of %(name)s has about %(longest)s tokens; this job truncates rows to %(limit)s, and at least %(num)s row is longer "
            "than that.",
            "The longest row of %(name)s has about %(longest)s tokens; this job truncates rows to %(limit)s, and at least %(num)s rows are longer "
            "than that.",
            rows, **values,
        )  # fmt: skip
    hint = gettext("They are truncated. Raise “Max length” to keep them whole.")
    return f"{said} {hint}"


def _odd_labels(dataset: Dataset) -> list[str]:
    labels, count = labels_of(dataset)
    found = []
    rows = dataset.good_rows or 0
    if count > 20 and count > rows / 2:
        found.append(
            gettext(
                "%(name)s has %(labels)s labels for %(rows)s rows. Check on its page which column holds the label: nearly every row has its own.",
                name=dataset.name,
                labels=human_number(count),
                rows=human_number(rows),
            )
        )
    elif lone := _finding(dataset, "rare_label"):
        names = [label for label, number in labels.items() if number == 1]
        found.append(
            ngettext(
                "%(num)s class has one row only (%(labels)s): it can be trained or evaluated, not both. "
                "Add rows, or merge such classes with others.",
                "%(num)s classes have one row only (%(labels)s): it can be trained or evaluated, not both. "
                "Add rows, or merge such classes with others.",
                lone,
                labels=named(names),
            )
        )
    if _finding(dataset, "mixed_labels"):
        numbers = [label for label in labels if label.lstrip("-").replace(".", "", 1).isdigit()]
        found.append(
            gettext(
                "Some labels are numbers (%(labels)s) and the others are words. Check that they mean what they should.",
                labels=named(numbers),
            )
        )
    return found


def _finding(dataset: Dataset, rule: str) -> int:
    return int((dataset.report or {}).get("findings", {}).get(rule, {}).get("count", 0))


def _round(value: float) -> int:
    """Rounded to two significant digits."""
    return int(float(f"{value:.2g}"))
