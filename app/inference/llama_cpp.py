"""llama.cpp as an engine of this studio's own on a processor: which models and requests it answers, and how a request is put to it.

A generate worker converts the model to GGUF once and runs it in a llama.cpp server of its own (`worker/inference/llama_cpp.py`). It is
about twice as fast as the built-in engine on a processor. The built-in engine stays for what it alone does: adapters that are more
than plain LoRA, soft prompts, blends, next-token probabilities, several adapters in one batch, and exactly the numbers of training.
"""

from __future__ import annotations

from typing import Any

from app.errors import BadField
from app.export_formats import FORMATS
from app.export_formats.gguf import ARCHITECTURES
from app.inference.external_server import Fold
from app.inference.protocol import LLAMA_CPP, AnswerStarted, ExternalEngine, GenerateRequest, Sampling
from app.languages import gettext
from app.settings import get_settings
from app.shapes import Shape
from app.spec import SILENT

TYPES = FORMATS["gguf"].types
DEFAULT_TYPE = "F16"
"""It keeps the weights: a small model in Q8_0 may give another answer even at temperature 0."""
SEEDS = 2**32 - 1
"""llama.cpp has seeds below this number, which itself means a seed that is drawn."""


def engine(kind: str, adapter: str | None = None) -> ExternalEngine:
    """The engine that runs a model in a GGUF type of `TYPES`, with the LoRA folder `adapter` on it. Raises BadField."""
    if kind not in TYPES:
        raise BadField(
            gettext("llama.cpp has no type %(kind)s.", kind=repr(kind[:40])),
            hint=gettext("There are %(names)s.", names=", ".join(TYPES)),
            param="engine_model",
        )
    return ExternalEngine(url=LLAMA_CPP, model=kind, adapter=adapter)


def runs(kind: str, shape: Shape) -> bool:
    """Whether llama.cpp computes a model of this kind and architecture as the studio does."""
    return kind not in SILENT and shape.model_type in ARCHITECTURES and not shape.mlp_bias


def by_setting() -> str | None:
    """The GGUF type that the setting LUTHIER_CPU_ENGINE names; None where it names the built-in engine. Raises BadField."""
    name, _, kind = get_settings().cpu_engine.partition(":")
    return engine(kind or DEFAULT_TYPE).model if name == LLAMA_CPP else None


def answers(sampling: Sampling, tools: object = None) -> bool:
    """Whether it samples as the built-in engine does: its penalties of frequency and presence count the prompt too, it reads JSON
    schemas in a way of its own, and it hides the special tokens that mark tool calls."""
    return not tools and not (sampling.frequency_penalty or sampling.presence_penalty) and sampling.n == 1 and sampling.json_schema is None


class LlamaFold(Fold):
    """One request to a llama.cpp server, whose defaults are not those of the API, and its answer."""

    def body(self) -> dict[str, Any]:
        s = self.request.sampling
        return super().body() | {
            "seed": self.request.seed % SEEDS, "top_k": s.top_k, "min_p": s.min_p, "repeat_penalty": s.repetition_penalty,
            "repeat_last_n": self.rendered.context if self.rendered else 0, "samplers": ["penalties", "temperature", "top_k", "top_p", "min_p"],
            "cache_prompt": not self.slides(self.request),
        }  # fmt: skip

    def started(self) -> AnswerStarted:
        """Without the syntax of an answer whose markers are special tokens, which llama.cpp hides."""
        started = super().started()
        return started.model_copy(update={"syntax": None}) if self.rendered and self.rendered.special else started

    @staticmethod
    def slides(request: GenerateRequest) -> bool:
        """Whether the model has sliding windows: with its cache of prompts llama.cpp continues another prompt of theirs wrongly."""
        return request.model.shape.model_type.startswith("gemma")
