"""What a search may change, and how a choice becomes the request of a job.

The plan of a search is made once, when it is ordered: for each method its settings, the run settings that all trials share, and the
estimate at the usual epochs. It is kept with the search, so that its trials stay alike whatever defaults change meanwhile.
"""

from __future__ import annotations

import math
from typing import Annotated, Any, NamedTuple

from pydantic import BaseModel, Field

from app.errors import BadField
from app.evaluation.comparison_plan import Plan, SharedOrder, title_of
from app.jobs import request as job_request
from app.jobs.request import JobRequest
from app.kit.forms import as_text
from app.languages import gettext, localized, mark
from app.spec import Split, usual_learning_rate
from app.strategies import Strategy
from app.tables import JSON

MAX_TRIALS, MAX_MINUTES = 100, 7 * 24 * 60.0
RATE_FACTORS = (0.2, 5.0)
"""Learning rates that are tried where none are named: from a fifth to five times each method's own."""
RANK_FACTORS = (0.5, 1.0, 2.0, 4.0)
EPOCH_FACTORS = (0.5, 1.0, 2.0)
REDUCTION = 3
"""Of the trials that reach a rung one in so many goes on."""
RUNGS = (1 / 9, 1 / 3)
"""The shares of its steps after which a trial pauses and is compared."""
MIN_RUNG_STEPS = 5
"""Steps before a trial is compared. Earlier the learning rate still warms up, and the highest one leads whatever comes of it."""
DECIDED = {
    "learning_rate": mark("Send learning_rate, which is one value or the ends of a range."),
    "epochs": mark("Send epochs, a list of those to try."),
    "eval_steps": None,
    "evaluations_per_epoch": None,
    "early_stopping_patience": None,
    "save_steps": None,
    "metric_for_best": None,
    "load_best": None,
    "seed": mark("Send seed."),
}
"""Run settings that a search decides itself, and a hint where they are named instead."""


class SearchOrder(SharedOrder):
    """What is searched, and how long. `run` holds for every trial."""

    model: str
    strategies: list[str | dict[str, Any]] = Field(["lora"], min_length=1, max_length=10)
    learning_rate: list[Annotated[float, Field(gt=0, le=1)]] | None = Field(
        None, min_length=1, max_length=2, description="The ends of the range, or one value. Empty: a fifth to five times each method's own."
    )
    rank: list[Annotated[int, Field(ge=1, le=4096)]] | None = Field(
        None, min_length=1, max_length=8, description="Ranks to try where a method has one. Empty: half to four times each method's own."
    )
    epochs: list[Annotated[float, Field(gt=0, le=1000)]] | None = Field(
        None, min_length=1, max_length=8, description="Epochs to try. Empty: half, all and twice the usual ones of the data."
    )
    trials: int = Field(12, ge=2, le=MAX_TRIALS, description="Settings that are tried at most.")
    minutes: float | None = Field(
        None, gt=0, le=MAX_MINUTES, description="Machine time that its runs may take together, the repetition included."
    )


class PlannedMethod(BaseModel):
    """One method of a search: its settings, those of the run at the usual epochs, and the estimate for them."""

    title: str
    strategy: dict[str, Any]
    run: dict[str, Any]
    usual_rate: float
    steps: int
    seconds: float

    def read(self) -> Strategy:
        return job_request.read_strategy(self.strategy)

    @property
    def ranks(self) -> list[int]:
        """Ranks around the method's own, within its bounds; empty where it has none or one was named with it."""
        strategy = self.read()
        if "rank" not in type(strategy).model_fields or "rank" in self.strategy:
            return []
        own, most = strategy.rank, max((getattr(rule, "le", 0) or 0 for rule in type(strategy).model_fields["rank"].metadata), default=0)  # type: ignore[attr-defined]
        return [rank for factor in RANK_FACTORS if 1 <= (rank := round(own * factor)) <= (most or rank)]


class TrialRequest(NamedTuple):
    """The job of one trial."""

    order: JobRequest
    title: str
    rungs: list[int | None]  # the step of each of RUNGS; None where the run is too short for it
    seconds: float  # estimate for all of it


def refuse(order: SearchOrder) -> None:
    """Raises BadField for settings that the search decides, and for ranges that are none."""
    for name, instead in DECIDED.items():
        if name in order.run:
            hint = gettext(instead) if instead else gettext("Omit it: every trial is evaluated at the same shares of its steps.")
            raise BadField(
                gettext("A search decides %(name)s itself.", name=name), hint=hint, param=f"run.{name}", code="setting_without_use"
            )
    if order.run.get("validation_fraction") == 0 and not (order.validation_file or order.validation_dataset_id):
        hint = gettext("Omit validation_fraction, or name a validation file.")
        raise BadField(gettext("Without validation rows no trial is better than another."), hint=hint, param="run.validation_fraction")
    if order.learning_rate and order.learning_rate[0] > order.learning_rate[-1]:
        low, high = order.learning_rate[0], order.learning_rate[-1]
        raise BadField(
            gettext("The range from %(low)s to %(high)s is empty.", low=localized(f"{low:g}"), high=localized(f"{high:g}")),
            hint=gettext("Send the lower end first."),
            param="learning_rate",
        )
    for name in ("rank", "epochs"):
        given = getattr(order, name) or []
        if len(set(given)) < len(given):
            raise BadField(gettext("A value of %(name)s is named twice.", name=name), hint=gettext("Name each once."), param=name)
    if order.epochs and order.run.get("max_steps"):
        raise BadField(gettext("max_steps ends every run, whatever its epochs."), hint=gettext("Omit one of the two."), param="epochs")


def methods_of(order: SearchOrder, plan: Plan, task: str) -> list[PlannedMethod]:
    """The methods that can run, as the plan of a comparison has them; one that does not train in steps is added to what it refuses. Raises
    BadField for a rank that one cannot have."""
    found = []
    for one in plan.jobs:
        strategy = job_request.read_strategy(one.order.strategy)
        if type(strategy).recipe == "features":
            reason = gettext("It has no learning rate, no epochs and no steps to pause at. Put it next to the winner in a comparison.")
            plan.refused.append({"model": one.model, "strategy": one.strategy, "title": one.title, "reason": reason})
            continue
        for rank in order.rank or () if "rank" in type(strategy).model_fields else ():
            job_request.read_strategy({**one.order.strategy, "rank": rank})
        run = {name: value for name, value in one.order.run.items() if name not in ("evaluations_per_epoch", "learning_rate")}
        rate = usual_learning_rate(strategy, task, str(run.get("optimizer", "adamw")))
        steps, seconds = one.estimate["steps"], one.estimate["seconds"]
        found.append(
            PlannedMethod(title=title_of(strategy), strategy=one.order.strategy, run=run, usual_rate=rate, steps=steps, seconds=seconds)
        )
    return found


def epochs_of(order: SearchOrder, methods: list[PlannedMethod]) -> list[float]:
    """The epochs to try, in order; one where nothing is to choose."""
    usual = float(methods[0].run.get("epochs", 3))
    if order.epochs:
        return sorted(order.epochs)
    if order.run.get("max_steps"):
        return [usual]
    return sorted({max(1.0, float(round(usual * factor))) for factor in EPOCH_FACTORS} | {usual})


def trial_request(order: SearchOrder, methods: list[PlannedMethod], params: JSON, seed: int, split_seed: int | None = None) -> TrialRequest:
    """The job of a choice: `params` has `method` (its place), `learning_rate`, `epochs`, and `rank` where the method has one."""
    method = methods[params["method"]]
    strategy = {**method.strategy, **({"rank": params["rank"]} if "rank" in params else {})}
    share = params["epochs"] / float(method.run.get("epochs", 3))
    steps = method.steps if order.run.get("max_steps") else max(1, math.ceil(method.steps * share))
    rungs, every = rungs_of(steps)
    run = {"samples": 0, **method.run, "epochs": params["epochs"], "learning_rate": params["learning_rate"]}
    run |= {"seed": seed, "early_stopping_patience": 0, **({"eval_steps": every} if every else {})}
    ranked = [f"rank {params['rank']}"] if "rank" in params else []
    words = [method.title, *ranked, f"learning rate {as_text(params['learning_rate'])}"]
    words += [f"{params['epochs']:g} {'epoch' if params['epochs'] == 1 else 'epochs'}"] if not order.run.get("max_steps") else []
    split = order.split
    if split_seed is not None and not (order.validation_dataset_id or order.validation_file):
        split = (split or Split()).model_copy(update={"seed": split_seed})
    request = JobRequest(
        model=order.model, dataset_id=order.dataset_id, training_file=order.training_file, split=split, task=order.task, strategy=strategy,
        validation_dataset_id=order.validation_dataset_id, validation_file=order.validation_file, run=run, preference=order.preference,
    )  # fmt: skip
    return TrialRequest(request, ", ".join(words), rungs, method.seconds * share)


def rungs_of(steps: int) -> tuple[list[int | None], int | None]:
    """(the step of each rung, steps between evaluations) of a run of so many steps. Rungs are evaluations, so that a trial is compared by
    what its validation rows say."""
    first, second = (round(steps * share) for share in RUNGS)
    if first >= MIN_RUNG_STEPS:
        return [first, REDUCTION * first], first
    return ([None, second], second) if second >= MIN_RUNG_STEPS else ([None, None], None)


def first_level(methods: list[PlannedMethod]) -> int:
    """The first level at which runs of the usual epochs pause: that of their first rung, or the level behind all rungs."""
    return max(next((level for level, step in enumerate(rungs_of(method.steps)[0], 1) if step), len(RUNGS) + 1) for method in methods)
