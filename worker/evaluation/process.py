"""The evaluation process: `python -m worker.evaluation.process`. Reads a spec, evaluates, and reports progress as lines of JSON
on a pipe.

Lines: `{"progress", "stage", "read", "written"}` any number of times, then one `{"result", "read", "written"}` (exit 0) or `{"error"}`
(exit 1); `read` and `written` are the tokens of all answers so far. It has no database address; its supervisor records what it reports.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import StudioError
from app.evaluation.predictions import OUTPUT
from app.evaluation.service import EvaluationSpec
from app.objectives import OBJECTIVES
from worker.runtime.fast_import import importing

with importing():
    import torch

    from worker.evaluation.scoring import Say, classify, engine_here, write
    from worker.runtime.device import Compute


def main(arguments: list[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    spec = EvaluationSpec.model_validate_json(Path(options.spec).read_bytes())
    with os.fdopen(options.events_fd, "w", encoding="utf-8", buffering=1) as pipe:

        def tell(**said: Any) -> None:
            pipe.write(json.dumps(said) + "\n")

        try:
            tell(**assess(spec, tell, Path(options.spec).parent))
            return 0
        except BrokenPipeError:
            return 1  # nobody reads the pipe any more
        except BaseException as error:
            traceback.print_exc(file=sys.stderr)
            with contextlib.suppress(OSError):
                tell(error=fault_of(error))
            return 1


def assess(spec: EvaluationSpec, tell: Callable[..., None], folder: Path) -> dict[str, Any]:
    """The last line for a spec; predictions are written into the folder. Raises BadData, BadModel, or what torch raises."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    began = time.monotonic()
    torch.manual_seed(spec.seed)
    engine = engine_here()

    def say(progress: float, stage: str) -> None:
        tell(progress=progress, stage=stage, **engine.meter.counts())

    found = _result(spec, engine, say, folder)
    result = {**found, "device": engine.name, "precision": engine.precision, "seconds": time.monotonic() - began}
    return {"result": result, **engine.meter.counts()}


def _result(spec: EvaluationSpec, engine: Compute, say: Say, folder: Path) -> dict[str, Any]:
    if spec.kind == "advice":
        from worker.evaluation.baselines import advise

        return advise(spec, engine, say)
    if spec.kind == "blend":
        from worker.evaluation.interpolation import blend

        return blend(spec, engine, say)
    if spec.kind == "predictions":
        from worker.evaluation.predict import predict

        return predict(spec, engine, say, folder / OUTPUT)
    if spec.kind == "vectors":
        from worker.evaluation.embedding_map import look

        return look(spec, engine, say)
    return classify(spec, engine, say) if OBJECTIVES[spec.task].classifies else write(spec, engine, say)


# What a failure is called -----------------------------------------------------------------------------------------------


def fault_of(error: BaseException) -> dict[str, Any]:
    """Code, message and hint of an exception."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error):
        where = "The GPU" if isinstance(error, torch.OutOfMemoryError) else "The machine"
        return {
            "code": "out_of_memory",
            "message": f"{where} ran out of memory.",
            "hint": "Take shorter rows or a smaller model, or wait until nothing else runs.",
        }
    if isinstance(error, StudioError):
        line = getattr(error, "line", None)
        message = f"Line {line}: {error.message}" if line is not None else error.message
        return error.as_problem() | {"message": message}
    return {
        "code": "crashed",
        "message": f"{type(error).__name__}: {error}"[:2000],
        "hint": "Look at the worker's log; if you see no reason, report it.",
    }


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m worker.evaluation.process", description="Score a model on a dataset.")
    parser.add_argument("--spec", required=True, help="file with the specification as JSON")
    parser.add_argument("--events-fd", required=True, type=int, help="open file descriptor that takes one JSON object per line")
    return parser


if __name__ == "__main__":
    sys.exit(main())
