"""What a job asks of the machine, as a person types it: `resources` of the request, and back into the form."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import NamedTuple

from pydantic import ValidationError

from app.jobs.request import bad_field
from app.machines import heartbeats
from app.machines.placement import Resources

GIGABYTE = 10**9
INPUTS = {name: f"resources.{name}" for name in ("gpus", "machines", "gpu", "gpu_memory_bytes", "labels")}
"""Fields of the request → inputs; the memory is typed in GB, the labels with commas."""


class Offers(NamedTuple):
    """What the train workers have that a job may ask for: names of GPUs, most of them in one machine, labels; and how many machines there are."""

    gpus: list[str]
    most: int
    labels: list[str]
    machines: int


def offers(typed: Mapping[str, str]) -> Offers | None:
    """None where there is nothing to choose from, and nothing was typed."""
    there = heartbeats.capacities()
    names = sorted({card.name for one in there for card in one.cards})
    labels = sorted({label for one in there for label in one.labels})
    found = Offers(names, max((len(one.cards) for one in there), default=0), labels, len(there))
    choice = found.most > 1 or found.machines > 1 or len(names) > 1 or found.labels or any(typed.get(name) for name in INPUTS.values())
    return found if choice else None


def asked(typed: Mapping[str, str], errors: dict[str, str]) -> Resources | None:
    """What was typed; None where nothing was. What is wrong is put into `errors`, by its input."""
    found: dict[str, object] = {name: typed.get(key, "").strip() for name, key in INPUTS.items()}
    found = {name: value for name, value in found.items() if value}
    if memory := found.get("gpu_memory_bytes"):
        with contextlib.suppress(ValueError, OverflowError):  # refused below, as it was typed
            found["gpu_memory_bytes"] = round(float(str(memory)) * GIGABYTE)
    if labels := found.get("labels"):
        found["labels"] = [label.strip() for label in str(labels).split(",") if label.strip()]
    try:
        return Resources.model_validate(found) if found else None
    except ValidationError as error:
        wrong = bad_field(error, "resources")
        name = (wrong.param or "").split(".")[1]
        errors[INPUTS[name]] = str(wrong)
        return None


def typed_from(resources: Resources | None) -> dict[str, str]:
    """The inputs that ask for this."""
    found = resources.model_dump(exclude_none=True) if resources else {}
    if memory := found.get("gpu_memory_bytes"):
        found["gpu_memory_bytes"] = f"{memory / GIGABYTE:.12g}"
    return {INPUTS[name]: ", ".join(value) if name == "labels" else str(value) for name, value in found.items() if value}
