"""Scores of the general probe before and after fine-tuning, for the verdict of `app/evaluation/forgetting.py`.

The probe is 72 short texts, some 4,000 tokens; scoring it draws no random number, so it does not change training. The scores of a
model before fine-tuning, and of every one that is evaluated, are cached under `features/` by everything they depend on: the next job on
it, and the next evaluation, measures none.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import yaml

from app.evaluation import forgetting as app_forgetting
from app.evaluation.forgetting import TextScore, compare
from app.settings import get_settings
from app.spec import JobSpec, ModelRef
from app.storage.atomic import write_atomically
from worker.data.batching import Row, Tokenised, tokenise
from worker.runtime.device import Compute
from worker.scoring import held_out

PROBE = Path(__file__).with_name("probe") / "general.yaml"


class Probe:
    """The probe's texts as tokenized for a model of this kind; `skills` and `bytes` are parallel to the rows of `data`."""

    data: Tokenised
    skills: list[str]
    bytes: list[int]

    def __init__(self, tokenizer: Any, kind: str, longest: int, lead: Sequence[int] = ()) -> None:
        entries = _entries()
        rows = [Row(line, _row(entry)) for line, (_, entry) in enumerate(entries, start=1)]
        self.data = tokenise(tokenizer, rows, kind, longest, lead)
        kept = [entries[line - 1] for line in self.data.lines]
        self.skills = [skill for skill, _ in kept]
        self.bytes = [_size(entry) for _, entry in kept]
        for place, (_, entry) in enumerate(kept):
            if "text" in entry:  # where a text ends is not part of its content
                self.data.trained[self.data.starts[place + 1] - 1] = False

    def score(self, model: torch.nn.Module, budget: int, engine: Compute) -> list[TextScore]:
        """The loss of every text, in nats."""
        nats = held_out.score_rows(model, self.data, budget, engine).nats
        return [TextScore(skill, loss, size) for skill, loss, size in zip(self.skills, nats, self.bytes, strict=True)]


def _entries() -> list[tuple[str, dict[str, Any]]]:
    """(skill, text) of the whole probe, in its order."""
    return [(skill, entry) for skill, texts in yaml.safe_load(PROBE.read_text(encoding="utf-8")).items() for entry in texts]


def probe_rows() -> list[dict[str, Any]]:
    """The texts as normalized rows."""
    return [_row(entry) for _, entry in _entries()]


def scores(
    spec: JobSpec, model: torch.nn.Module, tokenizer: Any, budget: int, engine: Compute, lead: Sequence[int] = ()
) -> list[TextScore]:
    """The score of every text under a generative model; `lead` are the virtual tokens of a soft prompt."""
    return Probe(tokenizer, spec.model.kind, spec.model.shape.positions, lead).score(model, budget, engine)


class ProbeCache:
    """The scores of one model: as this tokenizer writes the probe, by its chat template, and as the weights are loaded, the base in
    `bits` where it is quantized."""

    def __init__(
        self, ref: ModelRef, tokenizer: Any, engine: Compute, new_tokens: Sequence[str] | None = None, bits: int | None = None
    ) -> None:
        adapters = [[one.sha256 or one.path, one.blend] for one in ref.adapters if one.blend != 0]  # at blend 0 it is the model below
        loaded = [engine.rounding, str(engine.frozen), engine.fp8, bits]
        about = [ref.revision, adapters, ref.kind, loaded, list(new_tokens or ()), tokenizer.chat_template]
        digest = hashlib.sha256(json.dumps(about).encode() + PROBE.read_bytes()).hexdigest()[:40]
        self.path = get_settings().folder("features") / f"probe-{digest}.json"

    def read(self) -> list[TextScore] | None:
        """What an earlier job or evaluation measured; None when there is nothing."""
        return [TextScore(*entry) for entry in json.loads(self.path.read_text())] if self.path.is_file() else None

    def keep(self, found: list[TextScore]) -> list[TextScore]:
        """Cache what was measured now."""
        with contextlib.suppress(OSError):  # a full disk costs the next job the seconds this one took
            write_atomically(self.path, json.dumps(found))
        return found


def without_measuring(spec: JobSpec, labels: int) -> dict[str, Any] | None:
    """What is known about forgetting without scoring anything, `app.evaluation.forgetting.WithoutMeasuring` as plain data."""
    known = app_forgetting.without_measuring(spec.strategy, spec.model.shape, spec.task, labels)
    return known.model_dump(mode="json") if known else None


def compared(before: list[TextScore], after: list[TextScore]) -> dict[str, Any]:
    """The verdict, `app.evaluation.forgetting.Forgetting` as plain data."""
    return compare(before, after).model_dump(mode="json")


def _row(entry: dict[str, Any]) -> dict[str, Any]:
    if "text" in entry:
        return {"text": entry["text"]}
    return {"messages": [{"role": role, "content": turn[role]} for turn in entry["say"] for role in ("user", "assistant")]}


def _size(entry: dict[str, Any]) -> int:
    said = [entry["text"]] if "text" in entry else [turn["assistant"] for turn in entry["say"]]
    return sum(len(text.encode()) for text in said)
