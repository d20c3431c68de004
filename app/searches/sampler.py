"""Which settings are tried next: optuna's sampler, asked on a study that is rebuilt from what Postgres holds.

Nothing of optuna is kept: the study lives in memory for one question. Its sampler (TPE, Bergstra et al. 2011; multivariate, Falkner et
al. 2018) models the settings of the better trials apart from those of the others, and proposes what is likelier among the better. A
trial that paused or was pruned counts by its score at its last rung.
"""

from __future__ import annotations

import math
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

from app.searches.space import RATE_FACTORS, PlannedMethod, SearchOrder, epochs_of
from app.tables import JSON

if TYPE_CHECKING:
    import optuna

MIN_RANDOM = 4
"""Trials that are drawn at random, those at the defaults included, before the sampler has something to go by."""
DIGITS = 3
"""Significant digits of a learning rate that is tried: more would only make it hard to read."""


class PastTrial(NamedTuple):
    """What a trial tells the sampler: its settings, and its score (lower is better) at each rung that it reached; `ended` says that its
    score is that of the whole run. One that failed has no score and counts as worse than any other."""

    params: JSON
    scores: dict[int, float]
    moving: bool = False
    ended: bool = False


def propose(order: SearchOrder, methods: list[PlannedMethod], past: list[PastTrial], seed: int) -> JSON:
    """The settings of the next trial. The first ones are each method's own, so that the search is never worse than they are; the same
    past gives the same proposal."""
    if len(past) < len(methods):
        return defaults(order, methods, len(past))
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the parts of the sampler that optuna calls experimental
        startup = max(MIN_RANDOM, len(methods))
        sampler = optuna.samplers.TPESampler(seed=seed * 1_000 + len(past), n_startup_trials=startup, multivariate=True, group=True)
        study = optuna.create_study(sampler=sampler, direction="minimize")
        for one in past:
            study.add_trial(_frozen(order, methods, one))
        return _suggested(order, methods, study.ask())


def defaults(order: SearchOrder, methods: list[PlannedMethod], place: int) -> JSON:
    """A method's own settings, or the nearest that may be tried."""
    method = methods[place]
    low, high = _rates(order, method)
    params: JSON = {"method": place, "learning_rate": _rounded(min(max(method.usual_rate, low), high))}
    params["epochs"] = _nearest(epochs_of(order, methods), float(method.run.get("epochs", 3)))
    if ranks := _ranks(order, method):
        params["rank"] = int(_nearest(ranks, method.read().rank))  # type: ignore[attr-defined]
    return params


def _nearest(choices: list[float] | list[int], wanted: float) -> float:
    return min(choices, key=lambda choice: (abs(math.log(choice / wanted)), choice))


def _rates(order: SearchOrder, method: PlannedMethod) -> tuple[float, float]:
    if order.learning_rate:
        return order.learning_rate[0], order.learning_rate[-1]
    return method.usual_rate * RATE_FACTORS[0], min(1.0, method.usual_rate * RATE_FACTORS[1])


def _ranks(order: SearchOrder, method: PlannedMethod) -> list[int]:
    own = method.ranks
    return sorted(order.rank) if own and order.rank else own


def _rounded(rate: float) -> float:
    return float(f"{rate:.{DIGITS}g}")


# The study ------------------------------------------------------------------------------------------------------------


def _suggested(order: SearchOrder, methods: list[PlannedMethod], trial: optuna.Trial) -> JSON:
    """What the sampler chose. The learning rate is a place in the method's range, 0 to 1 by its logarithm, so that methods with other
    rates share what was learned about it; a rank is its place among the method's own."""
    place = int(trial.suggest_categorical("method", list(range(len(methods))))) if len(methods) > 1 else 0
    method = methods[place]
    low, high = _rates(order, method)
    share = trial.suggest_float("rate", 0.0, 1.0) if high > low else 0.0
    params: JSON = {"method": place, "learning_rate": _rounded(low * (high / low) ** share)}
    epochs = epochs_of(order, methods)
    params["epochs"] = epochs[trial.suggest_int("epochs", 0, len(epochs) - 1)] if len(epochs) > 1 else epochs[0]
    if ranks := _ranks(order, method):
        params["rank"] = ranks[trial.suggest_int(_rank_name(ranks), 0, len(ranks) - 1)] if len(ranks) > 1 else ranks[0]
    return params


def _rank_name(ranks: list[int]) -> str:
    """Methods with as many ranks share what is learned about them; a range of another length is another parameter."""
    return f"rank of {len(ranks)}"


def _frozen(order: SearchOrder, methods: list[PlannedMethod], past: PastTrial) -> optuna.trial.FrozenTrial:
    """A trial of the past as the study holds it: the inverse of `_suggested`."""
    import optuna
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    method, params, kinds = methods[past.params["method"]], dict[str, Any](), dict[str, Any]()
    if len(methods) > 1:
        params["method"], kinds["method"] = past.params["method"], CategoricalDistribution(list(range(len(methods))))
    low, high = _rates(order, method)
    if high > low:
        share = math.log(past.params["learning_rate"] / low) / math.log(high / low)
        params["rate"], kinds["rate"] = min(1.0, max(0.0, share)), FloatDistribution(0.0, 1.0)
    epochs, ranks = epochs_of(order, methods), _ranks(order, method)
    if len(epochs) > 1:
        params["epochs"], kinds["epochs"] = epochs.index(past.params["epochs"]), IntDistribution(0, len(epochs) - 1)
    if len(ranks) > 1:
        name = _rank_name(ranks)
        params[name], kinds[name] = ranks.index(past.params["rank"]), IntDistribution(0, len(ranks) - 1)
    state = optuna.trial.TrialState
    kind = state.COMPLETE if past.ended else state.RUNNING if past.moving else state.PRUNED
    value = past.scores[max(past.scores)] if past.ended else None
    return optuna.create_trial(state=kind, value=value, params=params, distributions=kinds, intermediate_values=past.scores)
