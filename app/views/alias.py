"""The data of the page of an alias: the model it points to, its gate, a model before the gate, and its moves."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from sqlalchemy.orm import Session

from app import objectives, saved_graders
from app.datasets import service as datasets
from app.errors import BadField, StudioError
from app.evaluation import gates
from app.evaluation import service as evaluations
from app.evaluation.gates import GateResult, PromotionGate
from app.kit import ids
from app.kit.humanize import human_percent
from app.languages import gettext, mark
from app.metrics import METRICS
from app.models import aliases
from app.models import service as models
from app.models.aliases import AliasTarget
from app.tables import JSON, AliasMove, Evaluation, Model, User

SHOWN = 50
HOW = {"set": mark("Set"), "gate": mark("Passed the gate"), "force": mark("By force"), "back": mark("Went back")}


class Candidate(NamedTuple):
    """Whether the alias may be moved to a model, and if not why."""

    same: bool = False
    missing: tuple[Model, ...] = ()
    open: tuple[Evaluation, ...] = ()
    running: bool = False
    numbers: str = ""
    fault: StudioError | None = None


class GateInWords(NamedTuple):
    """What a gate asks for; `fault` where something that it names was deleted."""

    dataset: str
    dataset_url: str
    grader: str
    bound: str
    fault: str


def context(
    session: Session,
    user: User,
    name: str,
    wanted: str = "",
    shown: int = SHOWN,
    reason: str = "",
    typed: Mapping[str, str] | None = None,
) -> dict[str, Any]:
    """What `alias.html` shows. `wanted` is the model that it may be moved to, `typed` the filled form of the gate. Raises NotFound."""
    target = aliases.get(session, user, name)
    gate: JSON = target.alias.gate or {}
    usable = [m for m in models.offered(session, user, wanted) if m.status == "ready" and m.kept]
    model = next((m for m in usable if wanted and wanted in (m.name, ids.public(ids.MODEL, m.id))), None)
    moves = list(session.scalars(aliases.moves(user, name).order_by(AliasMove.created_at.desc()).limit(shown + 1)))
    shown_gate = typed or _typed(gate)
    scorable = [d for d in datasets.with_rows(session, user, gate.get("dataset")) if objectives.get(d.task).scored]
    return {
        "alias": target.alias,
        "page": f"/aliases/{name}",
        "target": target.model,
        "gate": _in_words(session, user, gate) if gate else None,
        "models": usable,
        "wanted": model,
        "look": _look(session, user, target, model) if model else None,
        "reason": reason,
        "may_override": aliases.may_override(session, user, target.alias),
        "undoable": aliases.undoable(session, user, name),
        "datasets": [(ids.public(ids.DATASET, d.id), f"{d.name} v{d.version}" if d.version > 1 else d.name) for d in scorable],
        "graders": saved_graders.offered(session, user, *shown_gate.values()),
        "typed": shown_gate,
        "moves": [(move, move.result and gates.in_words(GateResult.model_validate(move.result))) for move in moves[:shown]],
        "more": shown + SHOWN if len(moves) > shown else None,
        "how": {how: gettext(words) for how, words in HOW.items()},
        "key": lambda one: ids.public(ids.MODEL, one.id),
        "evaluation_key": lambda one: ids.public(ids.EVALUATION, one.id),
    }


def _look(session: Session, user: User, target: AliasTarget, model: Model) -> Candidate:
    if model.id == target.model.id or not target.alias.gate:
        return Candidate(same=model.id == target.model.id)
    try:
        found = gates.state(session, user, target, model)
    except StudioError as fault:
        return Candidate(fault=fault)
    running = any(one.status in evaluations.OPEN for one in found.open)
    numbers = gates.in_words(found.result) if found.result else ""
    return Candidate(False, found.missing, found.open, running, numbers, found.fault)


def _in_words(session: Session, user: User, gate: JSON) -> GateInWords:
    dataset, grader, bound = gate["dataset"], gate["grader"], gate["max_forgetting"]
    url = fault = ""
    name, by = dataset, gettext(METRICS[grader].title) if grader in METRICS else grader
    try:
        name = datasets.get(session, user, ids.parse(ids.DATASET, dataset)).name
        url = f"/datasets/{dataset}"
        by = by if grader in METRICS else saved_graders.get(session, user, ids.parse_grader(grader)).name
    except StudioError as error:
        fault = error.message
    return GateInWords(name, url, by, "" if bound is None else str(human_percent(bound)), fault)


def _typed(gate: JSON) -> dict[str, str]:
    bound = gate.get("max_forgetting")
    grader = gate.get("grader", "")
    return {
        "dataset": gate.get("dataset", ""),
        "grader": "" if grader in METRICS else grader,
        "max_forgetting": "" if bound is None else f"{bound * 100:g}",
    }


def gate_of(typed: Mapping[str, str]) -> PromotionGate | None:
    """The gate of a filled form; None where no dataset is chosen. Raises BadField for a bound that is no number of percent."""
    if not typed["dataset"]:
        return None
    text = typed["max_forgetting"].strip().removesuffix("%")
    try:
        bound = float(text.replace(",", ".")) / 100 if text else None
        if bound is not None and not 0 <= bound <= 100:
            raise ValueError
    except ValueError:
        raise BadField(
            gettext("“%(text)s” is no bound of forgetting.", text=text[:20]),
            hint=gettext("Enter percent, as in 2, or leave it empty."),
            param="gate.max_forgetting",
        ) from None
    return PromotionGate(dataset=typed["dataset"], grader=typed["grader"] or None, max_forgetting=bound)
