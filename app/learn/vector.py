"""The vector: a text as numbers, and texts of six classes as a map."""

from __future__ import annotations

import math
import uuid
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from sqlalchemy.orm import Session

from app import limits
from app.datasets import samples
from app.errors import BadField, Unavailable
from app.evaluation import predictions
from app.inference import playground
from app.inference.playground import PendingAnswer, ResolvedModel
from app.inference.protocol import Embedded, Entry, GenerateRequest, Sampling, StreamError
from app.kit import ids
from app.kit.humanize import human_number
from app.languages import gettext, mark
from app.learn import _visits
from app.learn._base import Need, StartedStop, Stop, StopField, StopResult, StopTable, Typed
from app.models import service as models
from app.ownership import mine
from app.tables import Dataset, Evaluation, Model, StopVisit, User

TEXT = "Can you fix the crack in my guitar?"
NUMBERS = 12
COLORS = 8


class VectorStop(Stop):
    name: ClassVar = "vector"
    title: ClassVar = mark("The vector of a text")
    place: ClassVar = 90
    idea: ClassVar = mark(
        "In feature-based fine-tuning a frozen model turns each text into an n-dimensional vector. Texts of one meaning lie close together, "
        "so a small classifier on top (logistic regression, or a dense layer) gives each class a probability."
    )
    do: ClassVar = mark("Your text becomes a vector, is compared with rows of a sample, and all rows of the sample are drawn as a map.")
    words: ClassVar = ("Embedding", "Encoder", "Feature extraction")
    needs: ClassVar[tuple[Need, ...]] = ("encoder",)
    samples: ClassVar = ("shop-questions",)
    part: ClassVar = "learn/vector.html"
    button: ClassVar = mark("Turn it into a vector")
    reads: ClassVar = "encoded"

    def fields(self, session: Session, user: User, visit: StopVisit | None) -> list[StopField]:
        return [StopField("text", gettext("Text"), visit.refs["text"] if visit else TEXT, long=True)]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        text = typed.get("text", "").strip()[:2000]
        if not text:
            raise BadField(gettext("The text is empty."), hint=gettext("Write at least one word."), param="text")
        limits.check(session, user, "tokens_per_day")
        model, dataset = _visits.take_model(session, user, "encoder"), samples.add(session, user, self.samples[0])
        rows = _rows(dataset)
        found = predictions.create_vectors(session, user, model.name, ids.public(ids.DATASET, dataset.id))
        refs = {"text": text, "rows": rows, "map": str(found.id), "model": model.name}
        return StartedStop(refs, asked={"vectors": _request(session, user, model, [text, *(row["text"] for row in rows)])})

    def heard(self, session: Session, user: User, begun: StartedStop, entries: Mapping[str, Sequence[Entry]]) -> None:
        found = next((entry for entry in entries["vectors"] if isinstance(entry, Embedded)), None)
        if found is None:
            broke = next((entry for entry in entries["vectors"] if isinstance(entry, StreamError)), None)
            raise Unavailable(broke.message if broke else gettext("The encoder gave no vectors."), hint=gettext("Try it again."))
        own, *others = found.vectors
        for row, vector in zip(begun.refs["rows"], others, strict=True):
            row["cosine"] = math.fsum(a * b for a, b in zip(own, vector, strict=True))
        begun.refs |= {"size": len(own), "numbers": own[:NUMBERS]}

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        refs = visit.refs
        found = session.scalar(mine(Evaluation, user).where(Evaluation.id == uuid.UUID(refs["map"])))
        near = sorted(refs["rows"], key=lambda row: -row["cosine"])
        moving = found is not None and found.status in ("queued", "running")
        return StopResult(
            ended=not moving,
            doing=gettext("The map is being drawn") if moving else "",
            progress=found.progress if found and moving else None,
            fault="" if found is not None and found.status != "failed" else gettext("The map could not be drawn, or was deleted."),
            headline=gettext(
                "%(count)s numbers; nearest: “%(text)s” (%(label)s)",
                count=human_number(refs["size"]),
                text=near[0]["text"][:60],
                label=near[0]["label"],
            ),
            tables=[
                StopTable(
                    gettext("Rows of the sample by their cosine with “%(text)s”", text=refs["text"][:60]),
                    (gettext("Row"), gettext("Class"), gettext("Cosine")),
                    [[row["text"], row["label"], human_number(row["cosine"], 3)] for row in (*near[:4], *near[-2:])],
                    (2,),
                )
            ],
            notes=[gettext("1 is the same direction, 0 has nothing in common. The last two rows are those that are farthest.")],
            links=[(gettext("The map with every row and its neighbors"), map_path(found))] if found is not None else [],
            more={"points": _points(found), "numbers": refs["numbers"], "size": refs["size"], "model": refs["model"]},
        )


def map_path(found: Evaluation) -> str:
    return f"/playground/vectors/{ids.public(ids.EVALUATION, found.id)}"


def _rows(dataset: Dataset) -> list[dict[str, Any]]:
    """The first rows of a dataset with labels, as its report keeps them."""
    preview = (dataset.report or {}).get("preview", [])
    return [{"text": item["row"]["text"], "label": item["row"]["label"]} for item in preview]


def _request(session: Session, user: User, model: Model, texts: Sequence[str]) -> PendingAnswer:
    resolved = models.resolve(session, user, model.name)
    request = GenerateRequest(
        id=uuid.uuid4(), owner=user.id, model=resolved.ref, embed=[playground.readable(text) for text in texts], sampling=Sampling(), seed=0
    )
    return PendingAnswer(ResolvedModel(model.name, resolved), request)


def _points(found: Evaluation | None) -> list[dict[str, Any]]:
    """The points of the map, each with the number of its color."""
    points: list[dict[str, Any]] = ((found.result if found else None) or {}).get("points") or []
    labels = sorted({str(point["label"]) for point in points})
    return [point | {"color": min(labels.index(str(point["label"])), COLORS) + 1} for point in points]
