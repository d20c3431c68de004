"""Answers that a server (vLLM) draws while a model is trained: at each step it loads the adapter as it is then.

Its log-probabilities are those of its own arithmetic; `ratio_std` of each step says how far they are from the trainer's. What a server draws
depends on what else it answers, so a resumed job draws other answers than one that was not interrupted.
"""

from __future__ import annotations

import shutil
from collections.abc import Generator
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from functools import partial
from pathlib import Path
from typing import Any

import torch

from app.errors import BadData
from app.inference.questions import SERVED, DrawAsk
from app.strategies import Strategy
from worker.runtime.device import Compute
from worker.scoring.held_out import plain_model
from worker.scoring.sampler import Drawing, DrawnAnswer, DrawOrder
from worker.training.asking import Asker

AT_ONCE = 8
"""Prompts that the server is asked at the same time, each for all of its answers."""
LOOK_SECONDS = 1.0


class ServerSampler:
    """Draws through the supervisor, which asks the server. Adapters are written below `attempt`, the attempt's folder."""

    def __init__(self, asker: Asker, strategy: Strategy, attempt: Path) -> None:
        self.asker, self.strategy, self.folder = asker, strategy, attempt / SERVED

    def at(self, step: int | None) -> Drawing:
        """How a step draws; None draws from the base alone."""
        return partial(self._drawing, step)

    def _drawing(
        self, step: int | None, model: torch.nn.Module, tokenizer: Any, order: DrawOrder, engine: Compute
    ) -> Generator[float, None, list[list[DrawnAnswer]]]:
        """Raises ModelAway, and BadData for answers of another model's tokens."""
        assert order.seed is not None, "the likeliest answers are the worker's own"
        adapter, stops = self._written(model, step), tuple(sorted(order.stops))
        words = plain_model(model).config.get_text_config().vocab_size
        with ThreadPoolExecutor(AT_ONCE, thread_name_prefix="drawing") as pool:
            asked = [
                pool.submit(
                    self.asker.draw,
                    DrawAsk(adapter=adapter, prompt=prompt, count=order.per_prompt, most=order.most, stops=stops, seed=_seed(order, place)),
                )
                for place, prompt in enumerate(order.prompts)
            ]
            pending = set(asked)
            while pending:
                _, pending = wait(pending, LOOK_SECONDS, FIRST_COMPLETED)
                yield 1 - len(pending) / len(asked)
        found = [[DrawnAnswer(list(one.ids), list(one.nats), one.ended) for one in several.result()] for several in asked]
        if any(not 0 <= token < words for several in found for one in several for token in one.ids):
            raise BadData("The server answers with tokens that this model does not have.", hint="Let it serve the job's base model.")
        for folder in set(self.folder.glob("*")) - {self.folder / adapter}:
            shutil.rmtree(folder)  # the server has forgotten it: until then it may read it again
        engine.meter.add(sum(map(len, order.prompts)), sum(len(one.ids) for several in found for one in several))
        return found

    def _written(self, model: torch.nn.Module, step: int | None) -> str:
        """The name of the folder with the adapter of a step."""
        if step is None:
            return ""
        folder = self.folder / str(step)
        if not folder.is_dir():
            folder.mkdir(parents=True)
            self.strategy.save(model, folder)
        return folder.name


def _seed(order: DrawOrder, place: int) -> int:
    """Of the answers to one prompt. vLLM gives the answers of a request this seed and those behind it, whatever the prompt."""
    return ((order.seed or 0) * 1_000_003 + place * order.per_prompt) % 2**31
