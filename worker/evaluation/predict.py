"""Batch prediction over all rows of a file: classes with probabilities, answers, or embeddings, written as added columns."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from app.datasets import readers
from app.errors import BadData
from app.evaluation.predictions import MAX_ROWS
from app.evaluation.service import EvaluationSpec
from app.storage import places
from worker.data.batching import Row
from worker.data.chat_template import CHAT_KINDS, render_prompt
from worker.evaluation.scoring import BUDGET, Reader, Say
from worker.modeling import packed_attention
from worker.modeling.loading import load_model, load_tokenizer
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.scoring.answers import answers

AT_ONCE = {"answer": 32, "label": 64, "embedding": 64}
"""Rows between two progress reports."""
TEXT_COLUMNS = (
    "text", "prompt", "question", "input", "instruction", "content", "message", "body", "sentence", "review", "comment", "messages",
)  # fmt: skip

Predicted = dict[str, Any]


class Predictor(NamedTuple):
    """What a model adds to a row: the column names, and the values for some texts (or conversations) at once."""

    added: list[str]
    at_once: int
    predict: Callable[[Sequence[Any]], list[Predicted]]


def predict(spec: EvaluationSpec, engine: Compute, say: Say, out: Path) -> dict[str, Any]:
    """Write every row with its prediction to `out`. Raises BadData that names the first line that cannot be read."""
    rows = _rows(spec)
    column = spec.column or _detected(rows)
    if column not in rows[0] and not any(column in row for row in rows):
        raise BadData(f"The file has no column “{column}”.", hint=f"Choose one of {', '.join(list(rows[0])[:20])}.")
    say(0.0, f"Loading {spec.model.name}")
    predictor = _predictor(spec, engine)
    names = _free_names([*predictor.added, "note"], rows)
    without, done = 0, 0
    with out.open("w", encoding="utf-8") as file:
        for part in _parts(rows, predictor.at_once):
            given = [row.get(column) for row in part]
            asked = [place for place, value in enumerate(given) if value not in (None, "", []) and str(value).strip()]
            found = dict(zip(asked, predictor.predict([given[place] for place in asked]), strict=True)) if asked else {}
            for place, row in enumerate(part):
                said = found.get(place) or {"note": "empty"}
                without += predictor.added[0] not in said
                file.write(json.dumps(row | {names[name]: value for name, value in said.items()}, ensure_ascii=False) + "\n")
            done += len(part)
            say(done / len(rows), f"{done:,} of {len(rows):,} rows")
    columns = list(dict.fromkeys(name for row in rows for name in row))
    added = [names[name] for name in (*predictor.added, *(["note"] if without else []))]
    return {"rows": len(rows), "column": column, "added": added, "columns": [*columns, *added], "without": without}


def _rows(spec: EvaluationSpec) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    path = places.path(spec.dataset.path)
    if not path.is_file():
        raise BadData(f"The bytes of {spec.dataset.name} are gone.", hint="Upload the file again.")
    for raw in readers.read(path, spec.dataset.name):
        if raw.problem is not None and raw.problem.severity == "error":
            raise BadData(f"Line {raw.line}: {raw.problem.message}", hint="Fix the file and upload it again.")
        if raw.row is not None:
            found.append(raw.row if isinstance(raw.row, dict) else {"text": raw.row})
        if len(found) > MAX_ROWS:
            raise BadData(f"The file has more than {MAX_ROWS:,} rows.", hint="Split it.")
    if not found:
        raise BadData("The file has no rows.", hint="Upload a file with at least one row.")
    return found


def _detected(rows: Sequence[dict[str, Any]]) -> str:
    """The text column: by its name, else the one with the longest texts."""
    head = rows[:200]
    names = {name.lower(): name for row in head for name in row}
    if known := next((names[name] for name in TEXT_COLUMNS if name in names), None):
        return known
    sizes = {name: sum(len(row[name]) for row in head if isinstance(row.get(name), str)) for name in names.values()}
    best = max(sizes, key=lambda name: sizes[name])
    if not sizes[best]:
        raise BadData("No column of the file holds text.", hint="Name the column.")
    return best


def _free_names(added: Sequence[str], rows: Sequence[dict[str, Any]]) -> dict[str, str]:
    """For each added column a name that the file does not use."""
    taken, found = {name for row in rows for name in row}, {}
    for name in added:
        free = next(one for number in itertools.count(1) if (one := name if number == 1 else f"{name}_{number}") not in taken)
        found[name] = free
        taken.add(free)
    return found


def _parts(rows: Sequence[dict[str, Any]], size: int) -> Iterator[Sequence[dict[str, Any]]]:
    return (rows[start : start + size] for start in range(0, len(rows), size))


def _predictor(spec: EvaluationSpec, engine: Compute) -> Predictor:
    if spec.model.labels:
        return _classes(spec, engine)
    return _vectors(spec, engine) if spec.model.shape.architecture == "encoder" else _answers(spec, engine)


# Classes ----------------------------------------------------------------------------------------------------------------


def _classes(spec: EvaluationSpec, engine: Compute) -> Predictor:
    from worker.modeling.classifier import load_classifier
    from worker.training.objectives.classification import probabilities, tokenise_texts

    tokenizer = load_tokenizer(spec.model)
    classifier, labels = load_classifier(spec.model, engine.frozen, str(engine.device), packed_attention.NAME)
    lead = [tokenizer.pad_token_id or 0] * classifier.skip

    def predict(texts: Sequence[Any]) -> list[Predicted]:
        data = tokenise_texts(tokenizer, [Row(i, {"text": _text(t)}) for i, t in enumerate(texts)], spec.model.shape.positions, lead)
        found = probabilities(classifier, data, BUDGET, engine)
        engine.meter.add(len(data.ids), encoded=len(data.ids))
        return [
            {"label": labels[int(row.argmax())], "probability": round(float(row.max()), 6)}
            | {f"p_{label}": round(float(p), 6) for label, p in zip(labels, row, strict=True)}
            for row in found
        ]

    return Predictor(["label", "probability", *(f"p_{label}" for label in labels)], AT_ONCE["label"], predict)


# Vectors ----------------------------------------------------------------------------------------------------------------


def _vectors(spec: EvaluationSpec, engine: Compute) -> Predictor:
    reader = embedder(spec, engine)
    return Predictor(
        ["embedding"],
        AT_ONCE["embedding"],
        lambda texts: [{"embedding": [round(x, 6) for x in vector]} for vector in reader([_text(t) for t in texts]).tolist()],
    )


def embedder(spec: EvaluationSpec, engine: Compute) -> Callable[[Sequence[str]], Any]:
    """Unit vectors (texts, H): the model's mean-pooled last hidden states; longer texts are truncated."""
    import torch

    from worker.modeling.classifier import Classifier, load_backbone
    from worker.training.feature_cache import embed

    backbone = load_backbone(spec.model, engine.frozen, packed_attention.NAME, str(engine.device))
    reader, tokenizer = Classifier(backbone, torch.nn.Identity(), "mean", normalise=True), load_tokenizer(spec.model)
    longest = min(spec.max_length, spec.model.shape.positions)

    def vectors(texts: Sequence[str]) -> Any:
        making, tokens = embed(reader, tokenizer, list(texts), engine, max_length=longest), 0
        while True:
            try:
                tokens = next(making).tokens
            except StopIteration as done:
                engine.meter.add(tokens, encoded=tokens)
                return done.value

    return vectors


# Answers ----------------------------------------------------------------------------------------------------------------


def _answers(spec: EvaluationSpec, engine: Compute) -> Predictor:
    reader = Reader(spec.model, engine)
    model = load_model(spec.model, engine.frozen, packed_attention.NAME, str(engine.device))
    room = spec.model.shape.positions - spec.answer_tokens - len(reader.lead)

    def predict(given: Sequence[Any]) -> list[Predicted]:
        asked = [held_out.HeldOutPrompt("", render_prompt(reader.tokenizer, spec.model.kind, _prompt(spec, one))[1], "") for one in given]
        fit = [question for question in asked if 0 < len(question.ids) <= room]
        told = iter(answers(model, reader.tokenizer, fit, spec.answer_tokens, engine, reader.lead))
        return [{"answer": next(told)} if 0 < len(q.ids) <= room else {"note": "longer than the model reads"} for q in asked]

    return Predictor(["answer"], AT_ONCE["answer"], predict)


def _prompt(spec: EvaluationSpec, given: Any) -> str | list[dict[str, Any]]:
    """A cell as a prompt: a text, or a conversation up to the user's last message."""
    if spec.model.kind not in CHAT_KINDS:
        return _text(given)
    if isinstance(given, list) and given and all(isinstance(turn, dict) and "role" in turn for turn in given):
        last = max((place for place, turn in enumerate(given) if turn["role"] == "user"), default=len(given) - 1)
        turns = given[: last + 1]
    else:
        turns = [{"role": "user", "content": _text(given)}]
    system = [] if not spec.system or turns[0]["role"] == "system" else [{"role": "system", "content": spec.system}]
    return [*system, *turns]


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
