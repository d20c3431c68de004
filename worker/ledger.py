"""The loss ledger: each training row's mean loss before training and at its end, written beside the result.

A row that stays hard while the others got easy is often wrong or mislabelled; the data room sorts by it. The losses are
measured without dropout and draw no random number, so they change nothing in what is learnt.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import torch

from app.files import write_atomically
from worker import evaluate
from worker.batches import Tokenised, make_batch
from worker.device import Engine
from worker.loss import head_of, score
from worker.pack import best_fit

FILE = "ledger.json"
"""As `app/ledger.py` looks for it; this process does without the database that stands behind that file."""
BEFORE = "ledger-before.json"


def row_losses(model: torch.nn.Module, data: Tokenised, budget: int, engine: Engine) -> list[float]:
    """The mean loss of each row in nats per learnt token, in the order of the rows."""
    found = [0.0] * len(data)
    head = head_of(evaluate.plain_model(model))
    with evaluate.evaluating(model):
        for pack in best_fit(range(len(data)), data.lengths, budget):
            batch = make_batch(data, pack, engine.device)
            counts = [int(data.trained[data.starts[r] : data.starts[r + 1]].sum()) for r in pack]
            losses, _ = score(evaluate.hidden_states(model, batch, engine), head, batch.targets, engine.compute)
            for row, part in zip(pack, losses.double().cpu().split(counts), strict=True):
                found[row] = round(float(part.mean()), 5)
    return found


def before(job: Any) -> None:
    """Measure every row with the model as it was. Once in a job, whatever its attempts; a resumed job has it already."""
    path = _folder(job) / BEFORE
    if _wanted(job) and job.state.step == 0 and not path.is_file():
        losses = row_losses(job.model, job.data.train, job.data.budget, job.engine)
        write_atomically(path, json.dumps({"line": job.data.train.lines, "loss": losses}))


def after(job: Any) -> None:
    """Measure every row with the result, and write both sides beside it."""
    path = _folder(job) / BEFORE
    if not _wanted(job) or not path.is_file():
        return
    first = json.loads(path.read_text())
    data = job.data.train
    if first["line"] != data.lines:
        return
    losses = row_losses(job.model, data, job.data.budget, job.engine)
    tokens = [int(data.trained[start:end].sum()) for start, end in zip(data.starts[:-1], data.starts[1:], strict=True)]
    sound = all(map(math.isfinite, first["loss"] + losses))
    if sound:
        write_atomically(job.attempt / FILE, json.dumps({"line": data.lines, "before": first["loss"], "after": losses, "tokens": tokens}))


def _wanted(job: Any) -> bool:
    return bool(job.spec.run.row_losses) and job.spec.task == "generation"


def _folder(job: Any) -> Path:
    return Path(job.attempt).parent
