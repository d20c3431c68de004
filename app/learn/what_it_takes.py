"""What would it take? Memory, time and disk of four sizes by the formulas of the studio's own estimates, with the rules of thumb that
people quote beside them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from sqlalchemy.orm import Session

from app.errors import BadField
from app.kit.forms import whole_number
from app.kit.humanize import human_bytes, human_count, human_number, human_seconds
from app.languages import gettext, localized, mark
from app.learn._base import StartedStop, Stop, StopBar, StopBars, StopField, StopResult, StopTable, Typed
from app.planning import calculator, duration
from app.planning.calculator import MemoryRow
from app.shapes import Shape
from app.strategies import STRATEGIES
from app.tables import StopVisit, User

SIZES = (1.5, 7.0, 70.0, 175.0)
BATCH_TOKENS = 2048
WEIGHTS = "weights"
GPU_BYTES = 80 * 10**9
"""Memory of the GPU that the time is told for; a larger run is spread over several, which divide the time."""


class RuleOfThumb(NamedTuple):
    """A rule of thumb, who says so, and what our arithmetic has beside it."""

    says: str
    source: str
    ours: str


class WhatItTakesStop(Stop):
    name: ClassVar = "what-it-takes"
    title: ClassVar = mark("What would it take?")
    place: ClassVar = 120
    idea: ClassVar = mark(
        "To answer at all, one reads, a model of 1.5 billion parameters needs 16 GB of memory, and one of 175 billion about 400 GB. Few can "
        "afford to pre-train one; fine-tuning a small part of it needs far less."
    )
    do: ClassVar = mark("Choose a method and how many tokens it is trained on; memory, time and disk are computed for four sizes of model.")
    words: ClassVar = ("Parameter", "Quantization", "PEFT", "Optimizer", "Gradient")
    button: ClassVar = mark("Calculate")

    def fields(self, session: Session, user: User, visit: StopVisit | None) -> list[StopField]:
        chosen = visit.refs if visit else {"method": "lora", "tokens": 1_000_000}
        choices = tuple(
            (row.strategy or WEIGHTS, gettext(row.title)) for row in calculator.table(calculator.shape_for(SIZES[0]), BATCH_TOKENS)
        )
        return [
            StopField("method", gettext("Method"), str(chosen["method"]), choices),
            StopField("tokens", gettext("Tokens it is trained on, or writes"), str(chosen["tokens"])),
        ]

    def begin(self, session: Session, user: User, typed: Typed, visit: StopVisit | None) -> StartedStop:
        tokens, method = whole_number(typed.get("tokens", "").replace(",", "").strip()), typed.get("method", "")
        if _row(calculator.shape_for(SIZES[0]), method) is None:
            raise BadField(
                gettext("There is no method %(name)s.", name=repr(method[:40])), hint=gettext("Choose one of the list."), param="method"
            )
        if tokens is None or not 1 <= tokens <= 10**15:
            raise BadField(
                gettext("Tokens are a whole number from 1 to %(most)s.", most=human_number(10**15)),
                hint=gettext("Write one, such as 1000000."),
                param="tokens",
            )
        return StartedStop({"method": method, "tokens": tokens})

    def look(self, session: Session, user: User, visit: StopVisit) -> StopResult:
        method, tokens = visit.refs["method"], int(visit.refs["tokens"])
        shapes = {size: calculator.shape_for(size) for size in SIZES}
        rows = {size: _row(shape, method) for size, shape in shapes.items()}
        known = {size: row for size, row in rows.items() if row is not None}
        title = gettext(known[7.0].title)
        seconds = {size: seconds_for(shapes[size], method, tokens) for size in known}
        return StopResult(
            ended=True,
            headline=gettext("%(method)s: 7 B takes %(bytes)s in 16 bits", method=title, bytes=human_bytes(known[7.0].bytes[1])),
            bars=[_bars(title, known), *_costs(shapes, known, seconds, tokens, method)],
            tables=[_table(title, shapes, known), rules(shapes)],
            notes=[
                gettext(
                    "The bars are on a logarithmic scale: each step of the same length is the same factor. Time is that of one GPU at "
                    "%(speed)s trillion operations a second; several divide it.",
                    speed=f"{duration.SPEED_GPU / 1e12:.0f}",
                )
            ],
            links=[(gettext("The calculator for any size"), "/guide#memory")],
        )


def _row(shape: Shape, method: str) -> MemoryRow | None:
    found = calculator.table(shape, BATCH_TOKENS)
    return next((row for row in found if (row.strategy or WEIGHTS) == method), None)


def seconds_for(shape: Shape, method: str, tokens: int) -> float:
    """Seconds of one GPU for so many tokens: written with the weights alone, otherwise trained on once."""
    if method == WEIGHTS:
        return tokens * duration.forward_operations(shape, 1.0) / duration.SPEED_GPU
    return tokens * duration.operations_per_token(shape, STRATEGIES[method](), 1.0) / duration.SPEED_GPU


def disk_bytes(shape: Shape, method: str) -> int:
    """Bytes of the result: an adapter in float32, or a whole model in 16 bits."""
    strategy = STRATEGIES[method]() if method != WEIGHTS else None
    return 4 * strategy.trainable(shape) if strategy and type(strategy).adapter else 2 * shape.parameters()


def _bars(title: str, known: dict[float, MemoryRow]) -> StopBars:
    told = [(size, bits, found) for size, row in known.items() for bits, found in zip(calculator.BITS, row.bytes, strict=True) if found]
    shares = log_shares([found for _, _, found in told])
    return StopBars(
        gettext("Memory, %(method)s", method=title),
        [
            StopBar(gettext("%(size)s, %(bits)s bits", size=_billions(size), bits=bits), share, human_bytes(found))
            for (size, bits, found), share in zip(told, shares, strict=True)
        ],
    )


def _costs(
    shapes: dict[float, Shape], known: dict[float, MemoryRow], seconds: dict[float, float], tokens: int, method: str
) -> list[StopBars]:
    disk = {size: disk_bytes(shapes[size], method) for size in known}
    count = human_count(tokens)
    title = (
        gettext("Time to write %(count)s tokens", count=count)
        if method == WEIGHTS
        else gettext("Time to train on %(count)s tokens", count=count)
    )
    times = zip(seconds.items(), log_shares(list(seconds.values())), strict=True)
    sizes = zip(disk.items(), log_shares(list(disk.values())), strict=True)
    return [
        StopBars(title, [StopBar(_billions(k), share, human_seconds(v)) for (k, v), share in times]),
        StopBars(gettext("Disk for the result"), [StopBar(_billions(k), share, human_bytes(v)) for (k, v), share in sizes]),
    ]


def _billions(size: float) -> str:
    """A number of parameters: `1.5 B`."""
    return localized(f"{size:g} B")


def log_shares(values: Sequence[float]) -> list[float]:
    """Lengths of bars on a logarithmic scale that begins a factor of two below the smallest value."""
    low, high = math.log(min(values) / 2), math.log(max(values))
    return [(math.log(value) - low) / (high - low) for value in values]


def _table(title: str, shapes: dict[float, Shape], known: dict[float, MemoryRow]) -> StopTable:
    rows = [
        [
            _billions(size),
            human_count(shapes[size].parameters()),
            human_count(row.trainable) if row.strategy else "–",
            *map(human_bytes, row.bytes),
        ]
        for size, row in known.items()
    ]
    bits = (gettext("%(bits)s bits", bits=b) for b in calculator.BITS)
    head = (gettext("Size"), gettext("Parameters"), gettext("Trained"), *bits)
    return StopTable(gettext("%(method)s, memory by bits", method=title), head, rows, (1, 2, 3, 4, 5, 6))


def rules(shapes: dict[float, Shape]) -> StopTable:
    """What people quote, with its source, beside what the studio computes."""
    weights = {size: calculator.table(shape, BATCH_TOKENS)[0].bytes for size, shape in shapes.items()}
    full, lora = _row(shapes[7.0], "full"), _row(shapes[175.0], "lora")
    assert full is not None and lora is not None
    found = (
        RuleOfThumb(
            gettext("1.5 B needs 16 GB to answer"), gettext("introductions, for a whole computer"),
            gettext(
                "weights %(half)s in 16 bits, %(whole)s in 32; the rest is the system, the program and room",
                half=human_bytes(weights[1.5][1]), whole=human_bytes(weights[1.5][0]),
            ),
        ),
        RuleOfThumb(
            gettext("175 B needs about 400 GB to answer"), gettext("introductions"),
            gettext("weights %(half)s in 16 bits; the rest is keys, values and activations", half=human_bytes(weights[175.0][1])),
        ),
        RuleOfThumb(
            gettext("16 bytes a parameter to train all of it"), gettext("Rajbhandari et al. 2020 (ZeRO), mixed precision with Adam"),
            gettext(
                "7 B: %(rule)s by the rule, %(ours)s with activations",
                rule=human_bytes(16 * shapes[7.0].parameters()), ours=human_bytes(full.bytes[1]),
            ),
        ),
        RuleOfThumb(
            gettext("GPT-3 175 B: 1.2 TB in full, 350 GB with LoRA"), "Hu et al. 2021 (LoRA)",
            gettext(
                "LoRA in 16 bits: %(bytes)s, on a batch of %(tokens)s tokens", bytes=human_bytes(lora.bytes[1]), tokens=human_number(BATCH_TOKENS)
            ),
        ),
        RuleOfThumb(
            gettext("6 operations for each parameter and token"), "Kaplan et al. 2020",
            gettext(
                "7 B in full: %(operations)s",
                operations=human_number(duration.operations_per_token(shapes[7.0], STRATEGIES["full"](), 1.0) / shapes[7.0].parameters(), 1),
            ),
        ),
    )  # fmt: skip
    head = (gettext("People say"), gettext("Source"), gettext("Computed here"))
    return StopTable(gettext("Rules of thumb, and our arithmetic"), head, found)
