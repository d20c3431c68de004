"""Comparisons: several jobs on the same data, split, seed and token budget, created together and shown in one table.

Several base models are compared on the same rows with each of the chosen strategies. Their tokenizers differ, so generation is judged
by bits per byte, not by the loss of a token.

A learning curve compares one strategy with itself, on a quarter, half and all of the training rows. The validation rows are the
same for all, and so is the number of tokens each job reads: with fewer rows there are more epochs, so that the data differs and
not the training time.

A matrix is every base model on every one of several datasets. Each dataset is a comparison of its own: its jobs share their rows.

What is ordered and planned is in `app/evaluation/comparison_plan.py`, the table in `app/evaluation/comparison_table.py`.
"""

from __future__ import annotations

import contextlib
import uuid
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import ValidationError
from sqlalchemy import Select, func, select
from sqlalchemy.dialects.postgresql import insert
from sqlalchemy.orm import Session

from app import ownership
from app.errors import BadField, Conflict, DoesNotFit, NotFound
from app.evaluation.comparison_plan import ComparisonOrder, Plan, planned, read_strategies, refuse_many
from app.jobs import service as jobs
from app.jobs.request import bad_field
from app.kit import ids
from app.languages import english, gettext, ngettext
from app.models import service as models
from app.ownership import made, owned
from app.tables import JSON, Comparison, Job, Model, User

SEARCH = "search"
"""The kind of a comparison that is a search."""


def read_order(body: Mapping[str, Any]) -> ComparisonOrder:
    try:
        return ComparisonOrder.model_validate({name: value for name, value in body.items() if value is not None})
    except ValidationError as error:
        raise bad_field(error) from None


# Ordering -----------------------------------------------------------------------------------------------------------


def create(session: Session, user: User, order: ComparisonOrder, idempotency_key: str | None = None) -> Comparison:
    """A comparison and its queued jobs, in this transaction. A strategy that the model or machine cannot run is refused with the
    reason, and the others go on. Raises DoesNotFit when too few are left, and any error of the request."""
    asked = order.model_dump(mode="json", exclude_none=True)
    if idempotency_key is not None and (earlier := by_key(session, user, idempotency_key, asked)) is not None:
        return earlier
    plan, name = _planned(session, user, order)
    key = session.scalar(
        insert(Comparison)
        .values(
            id=uuid.uuid4(),
            owner_id=user.id,
            project_id=user.project_id,
            name=name,
            kind=order.kind,
            order=asked,
            refused=plan.refused,
            idempotency_key=idempotency_key,
        )
        .on_conflict_do_nothing(index_elements=["project_id", "owner_id", "idempotency_key"])
        .returning(Comparison.id)
    )
    if key is None:  # the same request came twice concurrently, and the other one won
        return by_key(session, user, idempotency_key or "", asked) or create(session, user, order, idempotency_key)
    comparison = made(session, session.get_one(Comparison, key))
    for one in plan.jobs:
        jobs.create(session, user, one.order.model_copy(update={"name": f"{name[:120]}: {one.title}", "comparison_id": key}))
    return comparison


def _planned(session: Session, user: User, order: ComparisonOrder) -> tuple[Plan, str]:
    """The plan and the name of the comparison. Both are stored, so they are in English."""
    with english():
        plan = planned(session, user, order)
        name = (order.name or f"{_title(order, plan)} on {plan.dataset_name}")[:200]
    _check_enough(order, plan)
    refuse_many(plan)
    return plan, name


def _check_enough(order: ComparisonOrder, plan: Plan) -> None:
    """Raises DoesNotFit with the reasons when nothing is left to compare."""
    reasons = " ".join(dict.fromkeys(r["reason"] for r in plan.refused))
    if order.kind == "learning_curve" and len(order.strategies) != 1:
        raise BadField(gettext("A learning curve is drawn for one strategy."), hint=gettext("Name exactly one."), param="strategies")
    if not plan.jobs:
        raise DoesNotFit(
            gettext("No method of this comparison fits. %(reasons)s", reasons=reasons[:1500]),
            hint=gettext("Choose other methods, another model, or fewer tokens per batch."),
            param="strategies",
            code="no_strategy_fits",
        )
    if len(plan.jobs) < 2:
        raise DoesNotFit(
            gettext("Only %(method)s is left to compare. %(reasons)s", method=plan.jobs[0].title, reasons=reasons[:1500]).strip(),
            hint=gettext("Choose at least two methods or base models that can run, or create one job."),
            param="strategies",
            code="nothing_to_compare",
        )


def _title(order: ComparisonOrder, plan: Plan) -> str:
    if order.kind == "learning_curve":
        return f"Learning curve of {read_strategies(order)[0].title}"
    if order.models:
        models_ = len({one.model for one in plan.jobs})
        return f"{models_} base model{'' if models_ == 1 else 's'}"
    return f"{len(plan.jobs)} methods"


def by_key(session: Session, user: User, key: str, asked: JSON) -> Comparison | None:
    found = session.scalar(
        select(Comparison).where(
            Comparison.project_id == user.project_id, Comparison.owner_id == user.id, Comparison.idempotency_key == key
        )
    )
    if found is not None and found.order != asked:
        raise Conflict(
            gettext("This Idempotency-Key was used for another order."),
            hint=gettext("Send a new key with a new order, or the first order unchanged."),
            param="Idempotency-Key",
            code="idempotency_key_reused",
        )
    return found


# Looking ------------------------------------------------------------------------------------------------------------


def mine(user: User) -> Select[Comparison]:
    """Comparisons of the person's project. Searches, which choose their jobs as they go, are in `app/searches/service.py`."""
    return ownership.mine(Comparison, user, Comparison.kind != SEARCH)


def get(session: Session, user: User, comparison_id: uuid.UUID) -> Comparison:
    """One's own comparison. Raises NotFound, also for another person's."""
    return owned(session, Comparison, user, comparison_id, Comparison.kind != SEARCH)


def jobs_of(session: Session, *found: Comparison) -> list[Job]:
    """The jobs of some comparisons in the order in which they were named, without deleted ones."""
    query = select(Job).where(Job.comparison_id.in_([c.id for c in found]), Job.deleted_at.is_(None))
    if found:
        query = query.where(Job.project_id == found[0].project_id)
    return list(session.scalars(query.order_by(Job.created_at, Job.id).execution_options(populate_existing=True)))


def status_of(found: Iterable[str]) -> str:
    """Status from those of its jobs: `queued`, `running` or `paused`; once every job has ended `succeeded` if one of them did,
    else `failed` or `cancelled`."""
    states = set(found)
    if states <= set(jobs.ENDED):
        return next((status for status in ("succeeded", "failed", "cancelled") if status in states), "cancelled")
    if states <= {"queued"}:
        return "queued"
    return "paused" if states <= {"paused", *jobs.ENDED} else "running"


# Asking -------------------------------------------------------------------------------------------------------------


def cancel(session: Session, user: User, comparison_id: uuid.UUID) -> Comparison:
    """Cancel every job of it that has not ended. Raises NotFound."""
    found = get(session, user, comparison_id)
    cancel_jobs(session, user, found)
    return found


def cancel_jobs(session: Session, user: User, found: Comparison) -> None:
    for job in jobs_of(session, found):
        if job.status not in jobs.ENDED:
            with contextlib.suppress(Conflict):  # it ended between the two queries
                jobs.cancel(session, user, job.id)


def delete(session: Session, user: User, comparison_id: uuid.UUID) -> None:
    """Delete the comparison; its jobs and their models stay. Raises NotFound, Conflict while a job of it has not ended."""
    remove(session, get(session, user, comparison_id), "comparison_id")


def remove(session: Session, found: Comparison, param: str) -> None:
    open_ = [job for job in jobs_of(session, found) if job.status not in jobs.ENDED]
    if open_:
        search = gettext("Cancel the search first, or wait for its jobs.")
        raise Conflict(
            ngettext(
                "%(num)s of its jobs has not ended (%(name)s is %(status)s).",
                "%(num)s of its jobs have not ended (%(name)s is %(status)s).",
                len(open_),
                name=open_[0].name,
                status=gettext(open_[0].status),
            ),
            hint=search if found.kind == SEARCH else gettext("Cancel the comparison first, or wait for its jobs."),
            param=param,
            code="wrong_state",
        )
    found.deleted_at = func.clock_timestamp()
    session.flush()


def keep(session: Session, found: Comparison, job_id: uuid.UUID) -> Model:
    """Offer the result of one of its jobs wherever models are chosen. Raises NotFound, Conflict for a job without a model."""
    job = next((job for job in jobs_of(session, found) if job.id == job_id), None)
    if job is None:
        raise NotFound(gettext("No such job in this comparison: %(id)s", id=ids.public(ids.JOB, job_id)), param="job")
    model = jobs.tuned_model(session, job)
    if model is None:
        raise Conflict(
            gettext("%(name)s has no model that could be kept.", name=job.name),
            hint=gettext("Keep the result of a job that succeeded."),
            param="job",
        )
    return models.keep(model)


def of_job(session: Session, job: Job) -> Comparison | None:
    """The comparison that a job belongs to, unless it was deleted."""
    if job.comparison_id is None:
        return None
    query = select(Comparison).where(Comparison.id == job.comparison_id, Comparison.project_id == job.project_id)
    return session.scalar(query.where(Comparison.deleted_at.is_(None)))
