"""Searches: ordered, led on from one trial to the next, ended. A search is a comparison whose jobs are chosen as it goes; its trials are
ordinary jobs, each with its number, its settings and its rungs in the column `trial`.

    running ──the leader was repeated and still leads──▶ succeeded (with a winner)
       │ ├───the time is over──────────────────────────▶ succeeded (with the best so far, if it was repeated)
       │ └───every trial failed────────────────────────▶ failed
       └─────cancel────────────────────────────────────▶ cancelled

Nothing of it lives in a process: each time a trial stops, a message makes a data worker read the trials from Postgres and take the next
decision (`advance`), in one transaction that holds the search's row. The reaper does the same for a message that was lost.
"""

from __future__ import annotations

import contextlib
import logging
import uuid
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Select, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import ownership, queue
from app.errors import Conflict, DoesNotFit, StudioError
from app.evaluation import comparisons
from app.evaluation.comparison_plan import ComparisonOrder, Plan, SharedOrder, planned
from app.evaluation.comparisons import SEARCH
from app.jobs import service as jobs
from app.jobs import spec_builder
from app.jobs.request import bad_field
from app.languages import SOURCE, current, english, gettext, mark
from app.limits import LimitReached
from app.machines import heartbeats
from app.metrics import figure, judged_by
from app.models import service as models
from app.ownership import made, maker_of, owned
from app.run_settings import RunSettings
from app.searches import halving, sampler, space, trials
from app.searches.halving import Budget, NextMove, Pruned
from app.searches.sampler import PastTrial
from app.searches.space import PlannedMethod, SearchOrder
from app.searches.trials import TrialJob
from app.tables import JSON, Comparison, User

log = logging.getLogger(__name__)

MAX_MOVES = 200
"""Decisions of one round: more would be a search that turns in a circle."""
SEED_STEP = 1000
"""A repetition's seed is this much above the trial's."""


def read_order(body: dict[str, Any]) -> SearchOrder:
    try:
        order = SearchOrder.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise bad_field(error) from None
    space.refuse(order)
    return order


# Ordering -----------------------------------------------------------------------------------------------------------


def plan(session: Session, user: User, order: SearchOrder) -> tuple[Plan, list[PlannedMethod]]:
    """(what a comparison of its methods would run and refuse, the methods of the search). Raises any error of the request, DoesNotFit where no
    method is left."""
    shared = order.model_dump(include=set(SharedOrder.model_fields))
    found = planned(session, user, ComparisonOrder(**shared, model=order.model))
    task = spec_builder.context_of(session, user, found.jobs[0].order).task if found.jobs else ""
    methods = space.methods_of(order, found, task)
    if not methods:
        reasons = " ".join(dict.fromkeys(one["reason"] for one in found.refused))
        raise DoesNotFit(
            gettext("No method of this search fits. %(reasons)s", reasons=reasons[:1500]),
            hint=gettext("Choose other methods, another model, or fewer tokens per batch."),
            param="strategies",
            code="no_strategy_fits",
        )
    return found, methods


def create(session: Session, user: User, order: SearchOrder, idempotency_key: str | None = None) -> Comparison:
    """A search and its first trial, queued in this transaction. Raises any error of the request."""
    asked = order.model_dump(mode="json", exclude_none=True)
    if idempotency_key is not None and (earlier := comparisons.by_key(session, user, idempotency_key, asked)) is not None:
        return earlier
    found, methods = plan(session, user, order)
    if current.get() != SOURCE:  # what is kept of it is English
        with english():
            found, methods = plan(session, user, order)
    state = {"status": "running", "methods": [method.model_dump(mode="json") for method in methods]}
    key = session.scalar(
        insert(Comparison)
        .values(
            id=uuid.uuid4(), owner_id=user.id, project_id=user.project_id, name=(order.name or f"Search on {found.dataset_name}")[:200],
            kind=SEARCH, order=asked, refused=found.refused, search=state, idempotency_key=idempotency_key,
        )
        .on_conflict_do_nothing(index_elements=["project_id", "owner_id", "idempotency_key"])
        .returning(Comparison.id)
    )  # fmt: skip
    if key is None:  # the same request came twice concurrently, and the other one won
        return comparisons.by_key(session, user, idempotency_key or "", asked) or create(session, user, order, idempotency_key)
    search = made(session, session.get_one(Comparison, key))
    _begin(session, user, search, [])  # what is wrong with the first trial is an error of the request
    queue.enqueue(session, queue.SEARCH, key)
    return search


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User) -> Select[Comparison]:
    return ownership.mine(Comparison, user, Comparison.kind == SEARCH)


def newest(session: Session, user: User, limit: int) -> list[Comparison]:
    """Newest first."""
    return list(session.scalars(mine(user).order_by(Comparison.created_at.desc(), Comparison.id.desc()).limit(limit)))


def get(session: Session, user: User, key: uuid.UUID) -> Comparison:
    """One's own search. Raises NotFound, also for another person's."""
    return owned(session, Comparison, user, key, Comparison.kind == SEARCH)


def state_of(search: Comparison) -> JSON:
    return search.search or {}


def order_of(search: Comparison) -> SearchOrder:
    return SearchOrder.model_validate(search.order)


def methods_of(search: Comparison) -> list[PlannedMethod]:
    return [PlannedMethod.model_validate(one) for one in state_of(search)["methods"]]


# Asking -------------------------------------------------------------------------------------------------------------


def cancel(session: Session, user: User, key: uuid.UUID) -> Comparison:
    """End a search: its runs that have not ended are cancelled. One that has ended is unchanged. Raises NotFound."""
    get(session, user, key)
    search = session.get_one(Comparison, key, with_for_update=True, populate_existing=True)
    if state_of(search)["status"] == "running":
        _settle(session, search, "cancelled", mark("It was cancelled."))
        comparisons.cancel_jobs(session, user, search)
    return search


def delete(session: Session, user: User, key: uuid.UUID) -> None:
    """Delete an ended search; its runs and their models stay. Raises NotFound, Conflict while it runs."""
    search = get(session, user, key)
    if state_of(search)["status"] == "running":
        raise Conflict(gettext("The search is running."), hint=gettext("Cancel it first."), param="search_id", code="wrong_state")
    comparisons.remove(session, search, "search_id")


# Leading on ---------------------------------------------------------------------------------------------------------


def reap(session: Session) -> dict[str, int]:
    """One round of the reaper: every running search, in case a message was lost."""
    running = select(Comparison.id).where(Comparison.kind == SEARCH, Comparison.search["status"].astext == "running")
    return {"advanced": sum(advance(session, key) for key in session.scalars(running.where(Comparison.deleted_at.is_(None))).all())}


def advance(session: Session, key: uuid.UUID) -> bool:
    """Take every decision that is due. False where there is none, or another process takes them."""
    query = select(Comparison).where(Comparison.id == key, Comparison.kind == SEARCH, Comparison.deleted_at.is_(None))
    search = session.scalar(query.with_for_update(skip_locked=True).execution_options(populate_existing=True))
    if search is None or state_of(search)["status"] != "running":
        return False
    user, moved = maker_of(session, search), False
    for _ in range(MAX_MOVES):
        found = trials.read(session, search)
        move = _next(search, found)
        if move.do == "wait":
            return moved
        try:
            with session.begin_nested():
                _do(session, user, search, found, move)
        except LimitReached as error:  # it goes on once other work of the person has ended
            return _waits(session, search, str(error)) or moved
        except StudioError as error:
            _fail(session, user, search, str(error))
            return True
        moved = True
        if move.do == "end":
            return True
    log.error("Search %s: no end of its decisions after %d.", key, MAX_MOVES)
    return moved


def _next(search: Comparison, found: list[TrialJob]) -> NextMove:
    return halving.decide([one.trial for one in found], wanted(search, found), _slots(), _budget(search, found))


def _budget(search: Comparison, found: list[TrialJob]) -> Budget:
    methods = methods_of(search)
    return trials.budget_of(found, mean_seconds(methods), order_of(search).minutes, space.first_level(methods))


def mean_seconds(methods: list[PlannedMethod]) -> float:
    """The estimate of one whole run at the usual epochs."""
    return sum(method.seconds for method in methods) / len(methods)


def wanted(search: Comparison, found: list[TrialJob]) -> int:
    """How many trials are tried: as many as were asked for, or fit the time by what is known by now."""
    return halving.affordable(_budget(search, found), order_of(search).trials)


def _slots() -> int:
    """How many trials are tried at a time: as many as there are workers that train."""
    return max(1, sum(worker.queue == "train" for worker in heartbeats.alive()))


def _do(session: Session, user: User, search: Comparison, found: list[TrialJob], move: NextMove) -> None:
    if move.do == "ask":
        _begin(session, user, search, found)
    elif move.do == "go_on":
        by_number = {one.trial.number: one for one in found if one.trial.repeats is None}
        for pruned in move.prune:
            _prune(session, user, by_number[pruned.number], pruned)
        for number in move.promote:
            _promote(session, user, by_number[number])
    elif move.do == "repeat":
        leader = next(one for one in found if one.trial.number == move.repeat)
        _start(session, user, search, found, leader.params, repeats=leader)
    else:
        _end(session, user, search, found, move)


def _begin(session: Session, user: User, search: Comparison, found: list[TrialJob]) -> None:
    """Ask the sampler for the next settings, and start their job."""
    order, firsts = order_of(search), [one for one in found if one.trial.repeats is None]
    past = [
        PastTrial(one.params, {level: score[0] for level, score in one.trial.scores.items()}, one.trial.moving, one.trial.ended)
        for one in firsts
    ]
    _start(session, user, search, found, sampler.propose(order, methods_of(search), past, order.seed or 0))


def _start(
    session: Session, user: User, search: Comparison, found: list[TrialJob], params: JSON, *, repeats: TrialJob | None = None
) -> None:
    """Queue the job of some settings; a repetition has another seed and the same validation rows, and does not pause."""
    order = order_of(search)
    own = order.seed if order.seed is not None else RunSettings().seed
    again = sum(one.trial.repeats is not None for one in found) + 1
    seed, split = (own, None) if repeats is None else ((own + SEED_STEP * again) % 2**31, own)
    asked = space.trial_request(order, methods_of(search), params, seed, split)
    number = max((one.trial.number for one in found), default=0) + 1
    title = asked.title if repeats is None else f"{asked.title}, seed {seed}"
    request = asked.order.model_copy(update={"name": f"{search.name[:100]}: {number}, {title}"[:200], "comparison_id": search.id})
    job = jobs.create(session, user, request)
    rungs = asked.rungs if repeats is None else [None for _ in asked.rungs]
    job.trial = {"number": number, "params": params, "title": title, "rungs": rungs, "repeats": repeats and repeats.trial.number}
    job.pause_at = next((step for step in rungs if step), None)
    session.flush()
    if state_of(search).get("waits"):
        search.search = {name: value for name, value in state_of(search).items() if name != "waits"}


def _promote(session: Session, user: User, one: TrialJob) -> None:
    """Let a trial go on from its checkpoint to its next rung, or to its end."""
    rungs = (one.job.trial or {})["rungs"]
    one.job.pause_at = next((step for step in rungs[one.trial.at or 0 :] if step), None)
    session.flush()
    jobs.resume(session, user, one.job.id)


def _prune(session: Session, user: User, one: TrialJob, pruned: Pruned) -> None:
    step, metric = (one.job.trial or {})["rungs"][pruned.level - 1], trials.metric_of(one.job.spec["task"])
    own, best = (figure(trials.written(metric, score), metric) for score in (one.trial.scores[pruned.level], pruned.worst_kept))
    went = f"the best {pruned.kept} went on, with {best} or better" if pruned.kept > 1 else f"the one that went on has {best}"
    why = f"Place {pruned.place} of {pruned.of} after step {step}: {judged_by(metric)} {own}; {went}."
    one.job.trial = {**(one.job.trial or {}), "out": why, "pruned": True}
    session.flush()
    with contextlib.suppress(Conflict):  # a person resumed it meanwhile
        jobs.cancel(session, user, one.job.id)


def _end(session: Session, user: User, search: Comparison, found: list[TrialJob], move: NextMove) -> None:
    """Call the winner, keep the better of its models, and stop whatever still runs."""
    firsts, repeats = ([one.trial for one in found if (one.trial.repeats is None) is first] for first in (True, False))
    order = halving.ranking(firsts, repeats)
    best = move.winner if move.winner is not None else (order[0] if order else None)
    runs = [one for one in found if best is not None and best in (one.trial.number, one.trial.repeats) and one.trial.ended]
    for one in found:
        if one.trial.moving or (one.job.status == "paused" and not one.trial.out):
            one.job.trial = {**(one.job.trial or {}), "out": _left(move)}
    session.flush()
    comparisons.cancel_jobs(session, user, search)
    if runs:
        kept = min(runs, key=lambda one: one.trial.scores[halving.END])
        if (model := jobs.tuned_model(session, kept.job)) is not None:
            models.keep(model)
    _settle(session, search, "failed" if move.why == "failed" else "succeeded", _why(move, best, found), winner=move.winner, best=best)


def _left(move: NextMove) -> str:
    return mark("The time of the search was over.") if move.why == "time" else mark("The search ended while it was paused by hand.")


def _why(move: NextMove, best: int | None, found: list[TrialJob]) -> str:
    if move.why == "failed":
        reason = next((one.job.error["message"] for one in found if one.job.error), "No trial was evaluated.")
        return f"No trial reached its end. {reason}"
    if move.winner is not None:
        late = " The time was over before others could be repeated." if move.why == "time" else ""
        return f"Trial {move.winner} is the winner: with another seed it was run again, and it leads with both results counted.{late}"
    if best is not None:
        return f"Trial {best} is the best so far. The time was over before it could be run again with another seed, so it is not called the winner."
    return mark("The time was over before a trial had ended. Resume the one that went furthest, or give the search more time.")


def _waits(session: Session, search: Comparison, why: str) -> bool:
    if state_of(search).get("waits") == why:
        return False
    search.search = {**state_of(search), "waits": why}
    session.flush()
    return True


def _fail(session: Session, user: User, search: Comparison, why: str) -> None:
    log.warning("Search %s failed: %s", search.id, why)
    _settle(session, search, "failed", why)
    comparisons.cancel_jobs(session, user, search)


def _settle(session: Session, search: Comparison, status: str, why: str, winner: int | None = None, best: int | None = None) -> None:
    ended = session.scalar(select(func.extract("epoch", func.clock_timestamp())))
    kept = {name: value for name, value in state_of(search).items() if name != "waits"}
    search.search = {**kept, "status": status, "why": why, "winner": winner, "best": best, "ended_at": int(ended or 0)}
    session.flush()
