"""Saved states a job can resume from: written aside, synced to disk, given a manifest, and renamed into place.

    checkpoint-<step>/
      weights/               what the strategy's `save` wrote, strategy.json and the tokenizer: the playground loads it
      trainer/               optimizer, rng, extra (the strategy's own state) and trained (weights that weights/ does not hold as they are);
                             where weights are spread over n processes, optimizer-<k>-of-<n> are each one's rows of the optimizer's state
      trainer/answers        answers that the next steps learn from too, where a step is not the last on what was drawn
      trainer/state.json     counters, early stopping, the facts of the engine, the base's answers
      manifest.json          sizes and SHA-256 of all of these

No pickle anywhere. A kill at any moment leaves either the whole folder under its name or a temporary one that is swept.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from app import events
from app.errors import StudioError
from app.kit import manifest
from app.older_settings import RENAMED
from app.settings import get_settings
from app.spec import JobSpec
from app.storage.atomic import sync
from app.strategies import Strategy
from worker.modeling import new_tokens
from worker.modeling.classifier import Classifier, save_classifier
from worker.modeling.loading import STRATEGY_FILE
from worker.runtime import devices
from worker.runtime.device import Compute
from worker.training.optim import Named

WEIGHTS, TRAINER = "weights", "trainer"


@dataclass
class State:
    """Where a job stands after an optimizer step. Seconds and tokens are over all attempts."""

    step: int = 0
    tokens: int = 0
    trained_tokens: int = 0
    seconds: float = 0.0  # of training steps alone
    wall_seconds: float = 0.0  # of everything: loading, evaluating, saving
    not_finite: int = 0  # steps in a row whose loss or gradient was not finite
    evaluated_at: int = -1
    best_loss: float | None = None  # or less the accuracy, where the best goes by that
    best_step: int | None = None
    best_path: str | None = None  # its checkpoint, relative to the data folder
    without_better: int = 0
    before: dict[str, float] = field(default_factory=dict)  # the untuned model on the validation rows
    last: dict[str, float] = field(default_factory=dict)  # the newest scores
    best: dict[str, float] = field(default_factory=dict)  # the best checkpoint on the same rows
    curve: list[tuple[int, float]] = field(default_factory=list)  # validation loss by step
    first_losses: list[float] = field(default_factory=list)  # of the first steps, and of the newest: a loss far above its start diverges
    recent_losses: list[float] = field(default_factory=list)
    base_answers: list[str] = field(default_factory=list)
    base_rows: list[float] = field(default_factory=list)  # the untuned model's loss on each validation row
    last_rows: list[float] = field(default_factory=list)  # at the newest evaluation
    best_rows: list[float] = field(default_factory=list)  # the best checkpoint's
    best_graded: list[float | None] = field(default_factory=list)  # the first grader's scores of the best checkpoint, by row
    recent_kl: list[float] = field(default_factory=list)  # of the newest steps, where a bound is set
    judged: dict[str, Any] = field(
        default_factory=dict
    )  # the best evaluation of a grader that is not the reward, and how often both parted since
    stop_reason: str = ""  # why the job stops by itself
    facts: dict[str, Any] = field(default_factory=dict)  # of the engine and the order; equal means bit-exact


@dataclass(frozen=True)
class WrittenCheckpoint:
    path: Path
    bytes: int
    manifest_sha256: str


def relative(path: Path) -> str:
    """A path as tables and events carry it: relative to the data folder."""
    return path.resolve().relative_to(get_settings().data_dir.resolve()).as_posix()


def write_folder(target: Path, fill: Callable[[Path], None], **facts: Any) -> WrittenCheckpoint:
    """Fill a folder under a temporary name and rename it to `target` once it is on disk with its manifest."""
    aside = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    shutil.rmtree(aside, ignore_errors=True)
    aside.mkdir(parents=True, mode=0o700)
    try:
        fill(aside)
        made = manifest.write(aside, **facts)
        for path in [*aside.rglob("*"), aside]:
            sync(path)
        digest = manifest.sha256_of(aside / manifest.NAME)
        if target.exists():  # left by a kill between the rename and its announcement, or by a save at the same step
            shutil.rmtree(target)
        os.rename(aside, target)
        sync(target.parent)
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        raise
    return WrittenCheckpoint(target, made["bytes"], digest)


def write_weights(folder: Path, model: torch.nn.Module, strategy: Strategy, tokenizer: Any) -> None:
    """What a strategy learnt, with its settings and the tokenizer, as the playground loads it."""
    folder.mkdir(exist_ok=True)
    if isinstance(model, Classifier):
        save_classifier(model, folder, model.labels)
        model = model.backbone
    strategy.save(model, folder)
    if type(strategy).adapter:
        new_tokens.save(model, folder)
    tokenizer.save_pretrained(folder)
    (folder / STRATEGY_FILE).write_text(strategy.model_dump_json(indent=1))


def save(
    attempt: Path,
    state: State,
    model: torch.nn.Module,
    strategy: Strategy,
    tokenizer: Any,
    trained: Named,
    optimizer: dict[str, torch.Tensor] | list[Path],
    rng: dict[str, torch.Tensor],
    answers: dict[str, torch.Tensor],
) -> WrittenCheckpoint:
    """Write `checkpoint-<step>` in the attempt's folder; the optimizer's state may be files on the same disk, which are taken;
    `answers` are those that further steps learn from."""
    body = model.backbone if isinstance(model, Classifier) else model

    def fill(folder: Path) -> None:
        write_weights(folder / WEIGHTS, model, strategy, tokenizer)
        own = folder / TRAINER
        own.mkdir()
        there = names(folder / WEIGHTS)
        missing = {name: p.detach().cpu().contiguous() for name, p in trained.items() if name not in there}
        save_file(_separate(missing), own / "trained.safetensors")
        if isinstance(optimizer, list):
            for piece in optimizer:
                os.rename(piece, own / piece.name)
        else:
            save_file(optimizer, own / "optimizer.safetensors")
        save_file(rng, own / "rng.safetensors")
        if answers:
            save_file(answers, own / "answers.safetensors")
        save_file({k: v.detach().cpu().contiguous() for k, v in strategy.extra_state(body).items()}, own / "extra.safetensors")
        (own / "state.json").write_text(json.dumps(asdict(state), indent=1))

    return write_folder(attempt / f"checkpoint-{state.step}", fill, step=state.step)


def names(folder: Path) -> set[str]:
    """Names of all tensors in a folder's safetensors files."""
    found: set[str] = set()
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            found.update(file.keys())
    return found


def _separate(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tied tensors as copies: safetensors refuses two names for one memory."""
    seen: set[int] = set()
    found = {}
    for name, tensor in tensors.items():
        found[name] = tensor.clone() if tensor.data_ptr() in seen else tensor
        seen.add(tensor.data_ptr())
    return found


def newest(runs: Path, step: int | None = None) -> Path | None:
    """The checkpoint of the highest step, over all attempts, whose manifest verifies; or of this `step`. Torn ones are passed over."""
    found = [p for p in runs.glob("a*/checkpoint-*") if p.name.rpartition("-")[2].isdigit() and p.is_dir()]
    found = [path for path in found if step in (None, _step(path))]
    for path in sorted(found, key=lambda p: (_step(p), _fence(p)), reverse=True):
        try:
            manifest.verify(path)
            return path
        except (StudioError, OSError):
            continue
    return None


def read_state(checkpoint: Path) -> State:
    return State(**json.loads((checkpoint / TRAINER / "state.json").read_text()))


def read_tensors(checkpoint: Path, name: str) -> dict[str, torch.Tensor]:
    return load_file(checkpoint / TRAINER / f"{name}.safetensors")


def piece_of(folder: Path, place: int, count: int) -> Path:
    """The file for one process's rows of the optimizer's state, of `count` such files."""
    return folder / f"optimizer-{place + 1:05}-of-{count:05}.safetensors"


def write_piece(path: Path, tensors: dict[str, torch.Tensor]) -> None:
    """Write one such file and have it on the disk, since another process moves it."""
    path.parent.mkdir(exist_ok=True, mode=0o700)
    save_file(tensors, path)
    sync(path)


Rows = Callable[[str, int], slice]
"""Which rows of a tensor, named `<moment>/<parameter>`, are wanted, given how many it has."""


def read_optimizer(checkpoint: Path, rows: Rows | None = None) -> dict[str, torch.Tensor]:
    """The optimizer's state, by however many processes it was written. With `rows` no others are read from the disk."""
    found: dict[str, list[Any]] = {}
    with contextlib.ExitStack() as opened:
        for path in sorted((checkpoint / TRAINER).glob("optimizer*.safetensors")):
            file = opened.enter_context(safe_open(path, "pt"))
            for key in file.keys():  # noqa: SIM118  # not a mapping
                found.setdefault(key, []).append(file.get_slice(key))
        return {key: _joined(pieces, rows and functools.partial(rows, key)) for key, pieces in found.items()}


def _joined(pieces: list[Any], rows: Callable[[int], slice] | None) -> torch.Tensor:
    if not pieces[0].get_shape():
        return pieces[0][...]
    counts = [piece.get_shape()[0] for piece in pieces]
    start, end, _ = (rows(sum(counts)) if rows else slice(None)).indices(sum(counts))
    wanted: list[torch.Tensor] = []
    before = 0
    for piece, count in zip(pieces, counts, strict=True):
        first, last = max(start - before, 0), min(end - before, count)
        if first < last or not wanted:  # a tensor without rows still has its other axes
            wanted.append(piece[first : max(first, last)])
        before += count
    return wanted[0] if len(wanted) == 1 else torch.cat(wanted)


@torch.no_grad()
def load_weights(checkpoint: Path, trained: Named) -> None:
    """Put a checkpoint's trained weights into the parameters. Raises KeyError naming one it lacks."""
    wanted = set(trained)
    for path in [checkpoint / TRAINER / "trained.safetensors", *(checkpoint / WEIGHTS).glob("*.safetensors")]:
        with safe_open(path, "pt") as file:
            for name in sorted(wanted & set(file.keys())):
                trained[name].copy_(file.get_tensor(name))
                wanted.discard(name)
    if wanted:
        raise KeyError(f"checkpoint {checkpoint.name} lacks {min(wanted)}")


def prune(attempt: Path, keep: int, best: str | None) -> None:
    """Remove this job's checkpoints but the newest `keep` and the best, and temporary folders that a kill left behind."""
    runs = attempt.parent
    for torn in runs.glob("a*/.*.tmp"):
        if not torn.name.endswith(f".{os.getpid()}.tmp"):
            shutil.rmtree(torn, ignore_errors=True)
    found = sorted((p for p in runs.glob("a*/checkpoint-*") if p.is_dir()), key=lambda p: (_step(p), _fence(p)), reverse=True)
    for old in found[keep:]:
        if relative(old) != best:
            shutil.rmtree(old, ignore_errors=True)


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _fence(path: Path) -> int:
    digits = path.parent.name[1:]
    return int(digits) if digits.isdigit() else 0


def spec_digest(spec: JobSpec) -> str:
    """What tells an order from every other. A setting that has another name now goes by its old one, so that a job which began under it
    is the same order."""
    told = spec.model_dump_json()
    for old, (new, _) in RENAMED.items():
        told = told.replace(f'"{new}":', f'"{old}":', 1)
    return hashlib.sha256(told.encode()).hexdigest()


def measured(state: State, engine: Compute) -> events.Measured:
    return events.Measured(
        peak_memory_bytes=devices.of(engine.device).peak_memory(engine.device),
        seconds=state.wall_seconds,
        tokens_per_second=state.tokens / state.seconds if state.seconds else 0.0,
        tokens=state.tokens,
        trained_tokens=state.trained_tokens,
        steps=state.step,
        device=engine.name,
    )
