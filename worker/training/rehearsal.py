"""Rehearsal: the base's own answers to general prompts, played in while it is fine-tuned, against forgetting.

The answers are drawn from the base's distribution (temperature 1, nothing cut off), so at the base the expected gradient of their loss is
zero, and what they pull back is only what fine-tuning moved (Li & Hoiem 2016, Learning without Forgetting,
https://arxiv.org/abs/1606.09282; with data of the model itself: Yang et al. 2024, https://arxiv.org/abs/2402.13669). They are written once
for a model, by seed, and cached under `features/` in small files, so that a killed job goes on writing where it was.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml

from app.errors import BadData
from app.planning.rehearsal import ANSWER_TOKENS, ROW_TOKENS
from app.settings import get_settings
from app.spec import JobSpec
from app.storage.atomic import write_atomically
from worker.data.batching import Tokenised
from worker.data.chat_template import CHAT_KINDS, render_prompt, stop_ids, template_of
from worker.runtime import distributed
from worker.runtime.device import Compute
from worker.scoring import held_out

PROMPTS = Path(__file__).with_name("general_prompts.yaml")
SEED = 20
AT_ONCE = 16
"""Prompts that are answered together: a file of the cache."""
POLL_SECONDS = 0.5


class GeneralRow(NamedTuple):
    """Token ids of a prompt and of the base's answer to it, its end included where the answer came to one."""

    prompt: list[int]
    answer: list[int]


def prompts(kind: str) -> list[str]:
    """The prompts for a model of this kind: questions, or beginnings of texts."""
    found: list[str] = yaml.safe_load(PROMPTS.read_text(encoding="utf-8"))["ask" if kind in CHAT_KINDS else "begin"]
    return found


def general_rows(
    spec: JobSpec, tokenizer: Any, model: torch.nn.Module, engine: Compute, lead: Sequence[int], longest: int
) -> Generator[float, None, Tokenised]:
    """The general rows of a job, with the virtual tokens `lead` before each and at most `longest` tokens, the loss on the answers. `model` is
    the base as loaded, without a strategy. Yields the share that is done. Raises BadData where no row has room for an answer."""
    kind = spec.model.kind
    asked = [_ids(tokenizer, kind, prompt) for prompt in prompts(kind)]
    folder = get_settings().folder("features") / f"rehearsal-{_digest(spec, tokenizer, engine)}"
    found: list[GeneralRow] = []
    for start in range(0, len(asked), AT_ONCE):
        yield start / len(asked)
        path = folder / f"{start:03}.json"
        if distributed.rank():  # the rows decide what is in a step, so all processes read what the first one wrote
            while not path.is_file():
                time.sleep(POLL_SECONDS)
        elif not path.is_file():
            _write(path, model, tokenizer, asked[start : start + AT_ONCE], engine, SEED + start)
        found += [GeneralRow(*pair) for pair in json.loads(path.read_text())]
    return _rows(found, lead, min(longest, ROW_TOKENS + len(lead)))


def _ids(tokenizer: Any, kind: str, prompt: str) -> list[int]:
    return render_prompt(tokenizer, kind, [{"role": "user", "content": prompt}] if kind in CHAT_KINDS else prompt)[1]


def _write(path: Path, model: torch.nn.Module, tokenizer: Any, asked: list[list[int]], engine: Compute, seed: int) -> None:
    """Let the base answer some prompts, and cache them with the answers."""

    stops = stop_ids(tokenizer, held_out.plain_model(model).generation_config)
    told = held_out.written(model, tokenizer, asked, stops, ANSWER_TOKENS, engine, seed=seed)
    write_atomically(path, json.dumps(list(zip(asked, told, strict=True))))


def _rows(found: Sequence[GeneralRow], lead: Sequence[int], longest: int) -> Tokenised:
    ids, trained, lines = [], [], []
    for line, (prompt, answer) in enumerate(found, start=1):
        before = len(lead) + len(prompt)
        if before and answer and before < longest:
            ids.append(np.asarray([*lead, *prompt, *answer][:longest], np.int32))
            trained.append(np.arange(len(ids[-1])) >= before)
            lines.append(line)
    if not ids:
        raise BadData(
            f"No general row has room for an answer within {longest} tokens, so none can be played in.",
            hint="Raise the max length, or set rehearsal_fraction to 0.",
        )
    starts = np.cumsum([0, *map(len, ids)]).astype(np.int64)
    return Tokenised(np.concatenate(ids), np.concatenate(trained), starts, lines, 0, [])


def digest_of(rows: Tokenised) -> str:
    """What a resumed job compares: it is the same job only with the same general rows."""
    return hashlib.sha256(rows.ids.tobytes() + rows.trained.tobytes()).hexdigest()[:16]


def _digest(spec: JobSpec, tokenizer: Any, engine: Compute) -> str:
    """What the answers follow from: the model and how it computes, the chat template, and the prompts."""
    model, strategy = spec.model, type(spec.strategy)
    about = [model.revision, [a.key for a in model.adapters], model.kind, engine.rounding, str(engine.frozen), strategy.base_bits]
    about += [list(spec.run.new_tokens)] if spec.run.new_tokens else []
    return hashlib.sha256(json.dumps([*about, template_of(tokenizer), SEED, ANSWER_TOKENS]).encode() + PROMPTS.read_bytes()).hexdigest()[
        :40
    ]
