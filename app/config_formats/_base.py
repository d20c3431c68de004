"""What the formats share: rules from a key of another program to a setting of this one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from app.errors import BadData
from app.objectives import OBJECTIVES
from app.strategies import STRATEGIES

NO_COUNTERPART = "has no counterpart here"


class Note(NamedTuple):
    """A setting that was not taken over as it is, and why."""

    key: str
    value: Any
    message: str


@dataclass
class Translation:
    """An order in the making. `body` has the keys of the other program, nested ones joined by dots."""

    body: Mapping[str, Any]
    order: dict[str, Any] = field(default_factory=dict)
    notes: list[Note] = field(default_factory=list)

    def put(self, path: str, value: Any) -> None:
        """Set a field of the order, as `run.epochs`."""
        place = self.order
        *parents, name = path.split(".")
        for parent in parents:
            place = place.setdefault(parent, {})
        place[name] = value

    def get(self, path: str) -> Any:
        """A field of the order; None where it is not set."""
        place: Any = self.order
        for name in path.split("."):
            place = place.get(name) if isinstance(place, dict) else None
        return place

    def note(self, key: str, message: str) -> None:
        self.notes.append(Note(key, self.body.get(key), message))


Rule = Callable[[Translation, str, Any], None]
"""`rule(translation, key, value)` says what a key of the other program means here."""


def to(path: str, convert: Callable[[Any], Any] = lambda value: value) -> Rule:
    """The key is the field `path` of the order. A value that cannot be converted is noted."""

    def rule(found: Translation, key: str, value: Any) -> None:
        try:
            found.put(path, convert(value))
        except (TypeError, ValueError):
            found.note(key, f"is no value of {path}")

    return rule


def one_of(path: str, names: Mapping[Any, Any]) -> Rule:
    """The key chooses one of `names`; other values are noted."""

    def rule(found: Translation, key: str, value: Any) -> None:
        if value in names:
            if names[value] is not None:
                found.put(path, names[value])
        else:
            found.note(key, NO_COUNTERPART)

    return rule


def if_positive(path: str) -> Rule:
    """The key is a whole number at `path`; 0 and -1 say that it is not used."""
    put = to(path, int)

    def rule(found: Translation, key: str, value: Any) -> None:
        if not isinstance(value, (int, float)) or value > 0:
            put(found, key, value)

    return rule


def left(why: str) -> Rule:
    """The key means something else here; said in a note."""
    return lambda found, key, value: found.note(key, why)


def nothing(found: Translation, key: str, value: Any) -> None:
    """The key has no effect on the result, or the studio does it by itself."""


def read_elsewhere(found: Translation, key: str, value: Any) -> None:
    """The key is read together with others, when all are known."""


@dataclass(frozen=True)
class ConfigFormat:
    """The configuration of one program."""

    name: str
    title: str
    recognizes: Callable[[Mapping[str, Any]], bool]
    rules: Mapping[str, Rule]
    finish: Callable[[Translation], None]
    """What several keys say together."""

    def translate(self, body: Mapping[str, Any]) -> Translation:
        """What a configuration orders here. Raises BadData for what cannot be trained."""
        flat = dict(_flat(body, self.rules))
        found = Translation(flat)
        for key, value in flat.items():
            if is_off(value) and key not in self.rules:
                continue
            rule = self.rules.get(key)
            if rule is None:
                found.note(key, NO_COUNTERPART)
            elif value is not None:
                rule(found, key, value)
        self.finish(found)
        if "warmup_steps" in (run := found.order.get("run", {})):
            run.pop("warmup_fraction", None)
        _keep_known(found)
        if "model" not in found.order:
            raise BadData(f"The configuration of {self.title} names no model.", hint="Write it down there first.")
        return found


def _keep_known(found: Translation) -> None:
    """Settings that the method does not have are taken out, and said."""
    settings = found.order.get("strategy")
    if settings is None:
        return
    known = STRATEGIES[settings["name"]].model_fields
    for name in [name for name in settings if name not in known]:
        found.notes.append(Note(f"strategy.{name}", settings.pop(name), f"is no setting of {STRATEGIES[settings['name']].title} here"))


def _flat(body: Mapping[str, Any], rules: Mapping[str, Rule], before: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in body.items():
        key = f"{before}{name}"
        if isinstance(value, Mapping) and key not in rules:
            yield from _flat(value, rules, f"{key}.")
        else:
            yield key, value


def is_off(value: Any) -> bool:
    """Whether a value says that something is not used."""
    return value is None or value is False or value in ("", "none", "None") or value == [] or value == {}


# Values that several programs spell alike -----------------------------------------------------------------------------

OPTIMIZERS = {
    "adamw": "adamw", "adamw_torch": "adamw", "adamw_torch_fused": "adamw", "adamw_hf": "adamw", "adamw_8bit": "adamw_8bit",
    "adamw_bnb_8bit": "adamw_8bit", "paged_adamw_8bit": "paged_adamw_8bit", "lion": "lion", "lion_32bit": "lion", "lion_pytorch": "lion",
    "adafactor": "adafactor", "muon": "muon",
}  # fmt: skip
SCHEDULES = {
    "cosine": "cosine", "linear": "linear", "constant": "constant", "constant_with_warmup": "constant",
    "cosine_with_restarts": "cosine_with_restarts", "warmup_stable_decay": "wsd",
}  # fmt: skip
TEMPLATES = {
    "chatml": "chatml",
    "llama3": "llama3",
    "gemma": "gemma",
    "gemma2": "gemma",
    "gemma3": "gemma",
    "alpaca": "alpaca",
    "tokenizer_default": "model",
}
ALL_LINEAR = {"q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"}

KEPT = "results are kept in the studio"
TEMPLATE = "the model's own chat template is taken"
PRECISION = "the precision is chosen for the device: bf16 where it has it"


def targets(found: Translation, key: str, value: Any) -> None:
    """Modules of LoRA, as a list or with commas: all linear ones, or their names."""
    names = [name.strip() for name in value.split(",")] if isinstance(value, str) else list(value)
    if set(names) >= ALL_LINEAR or names in (["all"], ["all-linear"], ["auto"]):
        found.put("strategy.layers", "all-linear")
    elif names and names != [""]:
        found.put("strategy.target_modules", ", ".join(map(str, names)))


def training_data(found: Translation, key: str, name: Any) -> None:
    """A path on this machine is the training file; a dataset of the hub has to be added first."""
    text = str(name)
    if text.rsplit(".", 1)[-1] in ("json", "jsonl", "csv", "tsv", "parquet", "txt", "arrow", "xlsx"):
        found.put("training_file", text)
    else:
        found.notes.append(Note(key, text, "is no file: add the dataset (Datasets, Add) and write its dataset_id"))


def low_rank(found: Translation, *, four_bit: bool, dora: bool = False, rslora: bool = False, pissa: bool = False) -> None:
    """The kind of LoRA that several switches say together."""
    kind = "qlora" if four_bit else "dora" if dora else "rslora" if rslora else "pissa" if pissa else "lora"
    if four_bit and (dora or rslora or pissa):
        found.notes.append(Note("quantization", "4bit", "DoRA, rsLoRA and PiSSA train on weights in full precision: QLoRA is taken"))
    found.put("strategy.name", kind)


def preferences(found: Translation, loss: str | None = None, **usual: float) -> None:
    """The settings of an objective that compares answers: its `loss`, and the other program's defaults where it names none. A setting
    that has no effect here is taken out, and said."""
    kind = OBJECTIVES[found.order["task"]].settings
    given = found.order.pop("preference", {})
    if kind is None:
        return
    settings = {**usual, **given} | ({"loss": loss} if loss else {})
    unused = kind.model_construct(None, **settings).unused()
    for name in [name for name in settings if name not in kind.model_fields or name in unused]:
        value = settings.pop(name)
        if given.get(name):
            found.notes.append(Note(f"preference.{name}", value, f"means nothing with the loss {loss or found.order['task']}"))
    found.order["preference"] = settings


def forget_rank(found: Translation) -> None:
    """Settings of LoRA say nothing about another method."""
    found.order["strategy"] = {"name": found.order.get("strategy", {}).get("name", "full")}
