"""What is frozen and what is trained, layer by layer, counted on a model of this studio for each family of methods."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

from sqlalchemy.orm import Session

from app.errors import BadField
from app.kit.humanize import human_count, human_percent
from app.languages import gettext, mark
from app.learn import _visits
from app.learn._base import Need, StartedStop, Stop, StopField, StopResult, StopTable, Typed
from app.shapes import Shape
from app.strategies import STRATEGIES, Strategy
from app.tables import StopVisit, User

SHOWN = (
    "feature_extraction",
    "dense_head",
    "top_layers",
    "full",
    "bottleneck_adapter",
    "prefix_tuning",
    "prompt_tuning",
    "layer_norm",
    "lora",
)
"""One or two methods of each family, in the order in which introductions tell them."""
FAMILIES = {
    "feature": mark("feature-based"),
    "partial": mark("partial"),
    "full": mark("full"),
    "additive": mark("additive"),
    "selective": mark("selective"),
    "reparametrized": mark("reparametrized"),
}
ALSO = {"top_layers": mark("partial; the literature lists it under selective too")}


class LayerCount(NamedTuple):
    """One part of a model: its parameters, and how many a method trains there, new ones included."""

    title: str
    parameters: int
    trained: int


class FrozenStop(Stop):
    name: ClassVar = "frozen"
    title: ClassVar = mark("What is frozen, what is trained")
    place: ClassVar = 100
    idea: ClassVar = mark(
        "Feature-based methods leave the model alone; partial ones add dense layers or train the last ones; full fine-tuning trains all. "
        "Parameter-efficient methods are additive (adapters, soft prompts), selective (only some layers) or reparametrized (LoRA)."
    )
    do: ClassVar = mark("Choose a method: the drawing counts what it freezes and trains in each layer of a model that is installed here.")
    words: ClassVar = ("Parameter", "PEFT", "Adapter", "Soft prompt", "LoRA", "Rank", "Feature extraction")
    needs: ClassVar[tuple[Need, ...]] = ("writes",)
    part: ClassVar = "learn/frozen.html"
    button: ClassVar = mark("Count")

    def fields(self, session: Session, user: User, visit: StopVisit | None) -> list[StopField]:
        choices = tuple((name, f"{gettext(STRATEGIES[name].title)} ({family_of(name)})") for name in SHOWN)
        return [StopField("method", gettext("Method"), visit.refs["method"] if visit else "lora", choices)]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        method = typed.get("method", "")
        if method not in SHOWN:
            raise BadField(
                gettext("There is no method %(name)s here.", name=repr(method[:40])),
                hint=gettext("Choose one of the list."),
                param="method",
            )
        model = _visits.take_model(session, user, "writes")
        return StartedStop({"method": method, "model": model.title, "shape": model.shape})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        shape, method = Shape.model_validate(visit.refs["shape"]), visit.refs["method"]
        layers = count_layers(STRATEGIES[method](), shape)
        total, trained = shape.parameters(), sum(layer.trained for layer in layers)
        title = gettext(STRATEGIES[method].title)
        return StopResult(
            ended=True,
            headline=gettext(
                "%(method)s trains %(trained)s of %(all)s, %(share)s",
                method=title,
                trained=human_count(trained),
                all=human_count(total),
                share=human_percent(trained / total, 2),
            ),
            more={"layers": layers, "model": visit.refs["model"], "method": STRATEGIES[method], "most": max(x.parameters for x in layers)},
            tables=[_families(shape)],
            links=[(gettext("%(method)s: how it works", method=title), f"/guide/{method}")],
        )


def family_of(method: str) -> str:
    return gettext(ALSO.get(method) or FAMILIES[STRATEGIES[method].family])


def count_layers(strategy: Strategy, shape: Shape) -> list[LayerCount]:
    """The parts of a model from the output down, each with what is trained in it. What a method spreads over all layers is found by
    counting a model with one layer less; what only the last layers have is in those that gradients reach."""
    total, classifies = strategy.trainable_parameters(shape, task=strategy.tasks[0], labels=2), strategy.tasks[0] == "classification"
    head = strategy.head_parameters(shape, 2) if classifies else 0
    own, embedding = shape.layer_parameters(), shape.embedding_parameters()
    full = strategy.trainable(shape) == shape.parameters()
    each = own if full else strategy.trainable(shape) - strategy.trainable(_shorter(shape))
    top = strategy.reaches(shape) if not each and strategy.trainable(shape) >= own else 0
    trained = [each or (own if place >= shape.layers - top else 0) for place in range(shape.layers)]
    rest = total - head - sum(trained)
    above = shape.parameters() - embedding - own * shape.layers
    in_input = embedding if full else rest if strategy.drawing().get("input") else 0
    layers = [LayerCount(gettext("Layer %(number)s", number=place + 1), own, trained[place]) for place in reversed(range(shape.layers))]
    return [
        LayerCount(gettext("Output"), above, rest - in_input + head),
        *layers,
        LayerCount(gettext("Embedding") if not in_input or full else gettext("Input, before the embedding"), embedding, in_input),
    ]


def _shorter(shape: Shape) -> Shape:
    """The same model with one layer less."""
    if shape.structure:
        order = shape.structure.order[:-1]
        gone = shape.structure.kinds[shape.structure.order[-1]].parameters
        found = shape.structure.model_copy(update={"order": order, "parameters": shape.structure.parameters - gone})
        return shape.model_copy(update={"layers": shape.layers - 1, "structure": found})
    return shape.model_copy(update={"layers": shape.layers - 1})


def _families(shape: Shape) -> StopTable:
    rows = []
    for name in SHOWN:
        strategy = STRATEGIES[name]()
        trained = strategy.trainable_parameters(shape, task=strategy.tasks[0], labels=2)
        rows.append(
            [gettext(STRATEGIES[name].title), family_of(name), human_count(trained), human_percent(trained / shape.parameters(), 3)]
        )
    head = (gettext("Method"), gettext("Family"), gettext("Trained"), gettext("Share"))
    return StopTable(gettext("The families on this model"), head, rows, (2, 3))
