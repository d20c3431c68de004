"""Gates of aliases: what a model must pass before an alias is moved to it.

A gate names a dataset and what is measured on it. The alias moves where evaluations of both models on that dataset, paired by the line
of the row, show that the new model is better: the 95% interval of the mean difference excludes zero. Rows that one of the two was
trained on do not count. With `max_forgetting`, the new model may also have lost only so much of its general ability.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Sequence
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict, Field
from sqlalchemy.orm import Session

from app import graders, objectives, saved_graders
from app.datasets import service as datasets
from app.errors import BadField, Conflict, NotFound, StudioError
from app.evaluation import service as evaluations
from app.kit import ids, stats
from app.kit.humanize import human_number, human_percent
from app.languages import gettext, localized, ngettext
from app.metrics import METRICS, in_text, signed
from app.models import aliases
from app.models import service as models
from app.models.aliases import AliasTarget
from app.tables import JSON, Dataset, Evaluation, Job, Model, ModelAlias, User

LOOKED_AT = 20
"""The newest evaluations of a model among which the pair is sought."""


class PromotionGate(BaseModel):
    """What a model must pass before an alias is moved to it."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    dataset: str = Field(max_length=100, description="Id of the dataset on which both models are scored.")
    grader: str | None = Field(
        None,
        max_length=100,
        description="Id of a saved grader, or the metric of the dataset's task, which is also taken where none is named: bits_per_byte of answers and texts, accuracy of labels.",
    )
    max_forgetting: float | None = Field(
        None,
        ge=0,
        le=100,
        description="How much more bits per byte general texts may take with the new model than with its base, as a share: 0.02 is 2%.",
    )


class AliasOrder(BaseModel, extra="forbid"):
    """Where an alias points to from now on, and its gate."""

    model: str | None = Field(
        None, min_length=1, max_length=512, description="The model that shall answer from now on. Without it the alias stays where it is."
    )
    gate: PromotionGate | None = Field(
        None, description="Its gate from now on; null removes it. Without this field the gate stays as it is."
    )
    force: bool = Field(False, description="Move it past the gate. Needs a reason, and who created the alias, or an admin.")
    reason: str | None = Field(None, min_length=1, max_length=1000, description="Why, for the history.")


class GateResult(BaseModel):
    """Two models compared on the rows of a gate's dataset that both were evaluated on. `interval` is the 95% interval of the mean
    difference, after less before."""

    measure: str
    grader: str
    dataset: str
    rows: int
    before: float
    after: float
    difference: float
    interval: tuple[float, float]
    better: bool
    forgetting: float | None = Field(description="Relative change of bits per byte on general texts; null where it is not measured.")
    max_forgetting: float | None
    passed: bool
    evaluations: tuple[str, str]


class _Measure(NamedTuple):
    """What a gate measures: the name of a metric, or a grader's with its JSON."""

    name: str
    grader: JSON | None = None

    @property
    def lower_is_better(self) -> bool:
        return self.grader is None and METRICS[self.name].lower_is_better

    def text(self) -> str:
        return gettext("the grader %(name)s", name=self.name) if self.grader is not None else in_text(self.name)

    def number(self, value: float) -> str:
        as_share = self.grader is not None or METRICS[self.name].unit == "share"
        return str(human_percent(value) if as_share else human_number(value, 3))


class _Scored(NamedTuple):
    """An evaluation with the score of each row by its line."""

    evaluation: Evaluation
    scores: dict[int, float]


class GateState(NamedTuple):
    """Where a model is before a gate: evaluations that are missing or not finished, or the result, and why it does not pass."""

    missing: tuple[Model, ...]
    open: tuple[Evaluation, ...]
    result: GateResult | None
    fault: StudioError | None


# Setting --------------------------------------------------------------------------------------------------------------


def apply(session: Session, user: User, name: str, order: AliasOrder) -> AliasTarget:
    """Point an alias to a model, set its gate, or both. The move must pass the gate that the alias has before.

    Raises what `aliases.set_` raises, BadField for a gate that cannot be measured, Conflict where the gate is not passed, and
    Forbidden where this person may not change or override it.
    """
    found = aliases.find(session, user, name, lock=True)
    if found is None and order.model is None:
        raise NotFound(
            gettext("No such alias: %(name)s.", name=repr(name[:120])), hint=gettext("Name a model to create it."), param="alias"
        )
    if order.force and not order.reason:
        raise BadField(
            gettext("force needs a reason."), hint=gettext("Say why the gate is passed over: the history keeps it."), param="reason"
        )
    gate = checked(session, user, order.gate) if order.gate else None
    changes_gate = "gate" in order.model_fields_set and found is not None and found.alias.gate is not None and found.alias.gate != gate
    if found is not None and ((order.force and found.alias.gate) or changes_gate):
        aliases.check_may_override(session, user, found.alias)
    if order.model is not None:
        found = _move(session, user, name, found, order)
    assert found is not None
    if "gate" in order.model_fields_set:
        found.alias.gate = gate
        session.flush()
    return found


def _move(session: Session, user: User, name: str, found: AliasTarget | None, order: AliasOrder) -> AliasTarget:
    assert order.model is not None
    if found is None or not found.alias.gate:
        return aliases.set_(session, user, name, order.model, "force" if order.force else "set", order.reason)
    model = models.get(session, user, order.model)
    if model.id == found.model.id:
        return found
    now = state(session, user, found, model)
    if now.fault is not None and not order.force:
        raise now.fault
    result = now.result.model_dump(mode="json") if now.result else None
    key = ids.public(ids.MODEL, model.id)
    return aliases.set_(session, user, name, key, "gate" if now.fault is None else "force", order.reason, result)


def checked(session: Session, user: User, wanted: PromotionGate) -> JSON:
    """A gate as it is stored, with its measure named. Raises NotFound and BadField where it cannot be measured."""
    dataset = _dataset(session, user, wanted)
    entry = objectives.get(dataset.task)
    if not entry.scored:
        raise BadField(
            gettext("Preference rows have no score that a gate could ask for."),
            hint=gettext("Use rows with answers or labels."),
            param="gate.dataset",
        )
    own = own_metric(dataset)
    grader = wanted.grader or own
    if grader.startswith(f"{ids.GRADER}-"):
        saved_graders.named(session, user, [grader], "gate.grader")
        if entry.classifies:
            raise BadField(
                gettext("Graders score answers, and these rows have labels."),
                hint=gettext("Use %(metric)s.", metric=own),
                param="gate.grader",
            )
    elif grader != own:
        raise BadField(
            gettext("gate.grader is %(grader)s.", grader=repr(grader[:60])),
            hint=gettext("For this dataset it is the id of a saved grader, or %(metric)s.", metric=own),
            param="gate.grader",
        )
    return {"dataset": ids.public(ids.DATASET, dataset.id), "grader": grader, "max_forgetting": wanted.max_forgetting}


def own_metric(dataset: Dataset) -> str:
    """The metric that a task is judged by where no grader is named. Bits per byte are comparable between tokenizers."""
    return "accuracy" if objectives.get(dataset.task).classifies else "bits_per_byte"


# Comparing ------------------------------------------------------------------------------------------------------------


def state(session: Session, user: User, target: AliasTarget, model: Model) -> GateState:
    """How a model stands before the gate of an alias, against the model that the alias points to."""
    gate, measure = _gate(target.alias), _measure(session, user, target.alias)
    dataset = _dataset(session, user, gate)
    found = [_scored(session, user, one, dataset, measure) for one in (target.model, model)]
    pair = _pair(*found)
    if pair is not None:
        result = _result(session, gate, measure, model, pair)
        return GateState((), (), result, None if result.passed else _refusal(target, model, dataset, measure, result))
    missing = [one for one, scored in zip((target.model, model), found, strict=True) if not scored] or [target.model, model]
    waiting = [e for one in missing for e in _of(session, user, one, dataset) if e.status in evaluations.OPEN and _measures(e, measure)]
    fault = _not_measured(target, dataset, measure, missing, waiting, both=bool(all(found)))
    return GateState(tuple(missing), tuple(waiting), None, fault)


def _gate(alias: ModelAlias) -> PromotionGate:
    return PromotionGate.model_validate(alias.gate)


def _dataset(session: Session, user: User, gate: PromotionGate) -> Dataset:
    try:
        return datasets.get(session, user, ids.parse(ids.DATASET, gate.dataset))
    except NotFound as fault:
        fault.param = "gate.dataset"
        raise


def _measure(session: Session, user: User, alias: ModelAlias) -> _Measure:
    name = str((alias.gate or {})["grader"])
    if not name.startswith(f"{ids.GRADER}-"):
        return _Measure(name)
    try:
        saved = saved_graders.get(session, user, ids.parse_grader(name))
    except NotFound:
        raise Conflict(
            gettext("The grader of the gate of %(alias)s was deleted.", alias=alias.name),
            hint=gettext("Set a gate with another grader."),
            param="gate.grader",
        ) from None
    return _Measure(saved.name, graders.to_json(graders.parse(saved.body)))


def _of(session: Session, user: User, model: Model, dataset: Dataset) -> list[Evaluation]:
    """The newest evaluations of this very model on a dataset, without those of its checkpoints and blends."""
    query = evaluations.mine(user, ("scores",)).where(Evaluation.model_id == model.id, Evaluation.dataset_id == dataset.id)
    query = query.where(Evaluation.spec["model"]["name"].astext == model.name).order_by(Evaluation.created_at.desc())
    return list(session.scalars(query.limit(LOOKED_AT)))


def _measures(evaluation: Evaluation, measure: _Measure) -> bool:
    spec = evaluation.spec
    return spec.get("note") != evaluations.TRAINED_ON and (measure.grader is None or measure.grader in spec.get("graders", ()))


def _scored(session: Session, user: User, model: Model, dataset: Dataset, measure: _Measure) -> list[_Scored]:
    """A model's finished evaluations that have a score of each row, newest first."""
    done = [e for e in _of(session, user, model, dataset) if e.status == "succeeded" and _measures(e, measure)]
    found = [_Scored(e, _row_scores(e.result or {}, measure)) for e in done]
    return [one for one in found if one.scores]


def _row_scores(result: JSON, measure: _Measure) -> dict[int, float]:
    if measure.grader is None:
        own = result.get("row_scores") or {}
        return {line: value for line, value in own.get("rows", ())} if own.get("metric") == measure.name else {}
    scores = ((row["line"], row["scores"][measure.name]["tuned"]) for row in result.get("graded") or ())
    return {line: score for line, score in scores if score is not None}


def _pair(before: Sequence[_Scored], after: Sequence[_Scored]) -> tuple[_Scored, _Scored] | None:
    """The evaluations with the most rows in common, scored in the same way; None below the fewest that say something. Of equal ones
    the newest."""
    alike = [(a, b) for a, b in itertools.product(before, after) if _way(a.evaluation) == _way(b.evaluation)]
    best = max(alike, key=_shared, default=None)
    return best if best is not None and _shared(best) >= stats.MIN_PAIRED else None


def _shared(pair: tuple[_Scored, _Scored]) -> int:
    return len(pair[0].scores.keys() & pair[1].scores.keys())


def _way(evaluation: Evaluation) -> tuple[Any, ...]:
    return tuple(evaluation.spec.get(name) for name in ("max_length", "answer_tokens"))


def _result(session: Session, gate: PromotionGate, measure: _Measure, model: Model, pair: tuple[_Scored, _Scored]) -> GateResult:
    lines = sorted(pair[0].scores.keys() & pair[1].scores.keys())
    before, after = ([one.scores[line] for line in lines] for one in pair)
    interval = stats.paired(before, after)
    assert interval is not None, "a pair has rows enough"
    better = interval[1] < 0 if measure.lower_is_better else interval[0] > 0
    forgot = _forgotten(session, model, pair[1].evaluation)
    bound = gate.max_forgetting
    old, new = statistics.fmean(before), statistics.fmean(after)
    return GateResult(
        measure=measure.name, grader=str(gate.grader), dataset=gate.dataset, rows=len(lines), before=old, after=new, difference=new - old,
        interval=interval, better=better, forgetting=forgot, max_forgetting=bound,
        passed=better and (bound is None or (forgot is not None and forgot <= bound)),
        evaluations=(ids.public(ids.EVALUATION, pair[0].evaluation.id), ids.public(ids.EVALUATION, pair[1].evaluation.id)),
    )  # fmt: skip


def _forgotten(session: Session, model: Model, evaluation: Evaluation) -> float | None:
    """The relative change of bits per byte on general texts; 0 for a base, which has nothing to be compared with."""
    if evaluation.spec.get("base") is None and model.base_id is None:
        return 0.0
    job = session.get(Job, model.job_id) if model.job_id else None
    told = (evaluation.result or {}).get("forgetting") or (job.forgetting if job is not None and model.step is None else None) or {}
    change = told.get("change")
    return float(change) if change is not None else None


# Refusing -------------------------------------------------------------------------------------------------------------


def _refusal(target: AliasTarget, model: Model, dataset: Dataset, measure: _Measure, result: GateResult) -> Conflict:
    """The gate is measured and not passed: the numbers in words."""
    better = gettext("Evaluate on more rows or use another model.")
    if not result.better:
        said = gettext(
            "%(model)s is not shown to be better than %(other)s: %(numbers)s.",
            model=model.name,
            other=target.model.name,
            numbers=in_words(result),
        )
    elif result.forgetting is None:
        said = gettext("%(model)s is better, but its forgetting was not measured, and the gate bounds it.", model=model.name)
    else:
        said = gettext(
            "%(model)s is better, but general texts take %(change)s bits with it, and the gate allows +%(bound)s.",
            model=model.name,
            change=signed(result.forgetting),
            bound=human_percent(result.max_forgetting),
        )
        better = gettext(
            "Train with a lower learning rate, fewer epochs, an adapter, or a share of general rows: all of these forget less."
        )
    stays = gettext("%(alias)s stays where it is.", alias=target.alias.name)
    return Conflict(
        f"{stays} {said}",
        hint=better + " " + gettext("Who created the alias, and admins, can move it with force and a reason."),
        param="model",
        code="gate_not_passed",
    )


def in_words(result: GateResult) -> str:
    """The numbers of a result: `accuracy 0.81, before 0.74, on 120 rows; difference +0.07 (95% interval +0.01 to +0.13)`."""
    measure = _Measure(result.measure, {} if result.grader.startswith(f"{ids.GRADER}-") else None)
    low, high = result.interval
    return ngettext(
        "%(measure)s %(after)s, before %(before)s, on %(num)s row; difference %(difference)s (95%% interval %(low)s to %(high)s)",
        "%(measure)s %(after)s, before %(before)s, on %(num)s rows; difference %(difference)s (95%% interval %(low)s to %(high)s)",
        result.rows,
        measure=measure.text(),
        after=measure.number(result.after),
        before=measure.number(result.before),
        difference=_signed(result.difference),
        low=_signed(low),
        high=_signed(high),
    )


def _signed(value: float) -> str:
    return localized(f"{value:+.3f}").replace("-", "−")


def _not_measured(
    target: AliasTarget, dataset: Dataset, measure: _Measure, missing: Sequence[Model], waiting: Sequence[Evaluation], *, both: bool
) -> Conflict:
    names = list(dict.fromkeys(one.name for one in missing))
    about = {
        "alias": target.alias.name,
        "measure": measure.text(),
        "dataset": dataset.name,
        "models": names[0] if len(names) == 1 else gettext("%(one)s and %(other)s", one=names[0], other=names[1]),
    }
    if both:
        said = gettext(
            "The gate of %(alias)s compares %(measure)s on %(dataset)s, and the evaluations of %(models)s have fewer than %(rows)s rows "
            "in common that neither was trained on and that were scored in the same way.",
            **about,
            rows=stats.MIN_PAIRED,
        )
    else:
        said = gettext(
            "The gate of %(alias)s compares %(measure)s on %(dataset)s, and there is no finished evaluation of %(models)s with it.", **about
        )
    path = f"/v1/model_aliases/{target.alias.name}/evaluations"
    hint = gettext(
        "Start what is missing with POST %(path)s or on the page of the alias, and move the alias when it has succeeded.", path=path
    )
    if waiting:
        hint = ngettext(
            "%(num)s evaluation for it is queued or running: try again after the end.",
            "%(num)s evaluations for it are queued or running: try again after the end.",
            len(waiting),
        )
    return Conflict(said, hint=hint, param="model", code="evaluations_missing")


# Measuring ------------------------------------------------------------------------------------------------------------


def start(session: Session, user: User, target: AliasTarget, model: Model) -> list[Evaluation]:
    """Start the evaluations that a move of an alias to a model needs and that do not exist yet; one that is queued or running is
    returned.

    Raises what `evaluations.create` raises, and Conflict for an alias without a gate."""
    if not target.alias.gate:
        raise Conflict(
            gettext("%(alias)s has no gate.", alias=target.alias.name),
            hint=gettext("Move it as it is, or set a gate first."),
            param="alias",
        )
    now = state(session, user, target, model)
    dataset = _dataset(session, user, _gate(target.alias))
    splits = {one.id: _split_of(session, user, one, dataset) for one in (target.model, model)}
    shared = next((split for split in splits.values() if split), {})
    body: JSON = {"dataset_id": _gate(target.alias).dataset}
    body |= {"graders": [_gate(target.alias).grader]} if _measure(session, user, target.alias).grader else {"answers": 0}
    made = []
    for one in now.missing:
        order = body | {"model": one.name} | ({} if splits[one.id] else shared)
        made.append(evaluations.create(session, user, evaluations.read_order(order)))
        if made[-1].spec["note"] == evaluations.TRAINED_ON:
            raise Conflict(
                gettext(
                    "%(model)s was trained on every row of %(dataset)s, so a score there says nothing about new rows.",
                    model=one.name,
                    dataset=dataset.name,
                ),
                hint=gettext("Set a gate with a dataset that no model was trained on."),
                param="gate.dataset",
            )
    return made


def _split_of(session: Session, user: User, model: Model, dataset: Dataset) -> JSON:
    """The validation split of the job that made a model, where it was trained on this dataset: the rows that are new to it. Empty
    where all rows are."""
    job, _ = models.origin(session, models.resolve(session, user, ids.public(ids.MODEL, model.id)))
    if job is None or job.dataset_id not in datasets.family(session, dataset):
        return {}
    run = job.spec["run"]
    return {"part": "validation", "seed": run.get("seed"), "validation_fraction": run.get("validation_fraction") or None}
