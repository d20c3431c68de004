"""Sequence classifiers: a backbone without its language-model head, pooling to one vector per text, and a classification head.

The backbone may be an encoder or a decoder. Texts are packed into one row of T tokens, as everywhere in training; their lengths
say where each begins.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModel, PreTrainedModel

from app.models.integrity import BadModel
from app.spec import Adapter, ModelRef
from app.strategies import Strategy
from app.strategies._model import backbone as body_without_head
from app.strategies._model import transformer, wrapped
from worker.modeling.loading import folder_of, lay_adapter, load_plain, load_strategy, made_ready, own_attention, straight_to
from worker.runtime.transfer import sent

Pooling = Literal["mean", "last", "first"]
_POOLED = ("bert", "roberta", "xlm-roberta", "mpnet")
"""Encoders that come with a pooler of their own."""
HEADED = "has a head of its own on another model, so it cannot be fine-tuned further."
HEAD_FILE, ABOUT_FILE = "classifier_head.safetensors", "classifier.json"


def load_backbone(ref: ModelRef, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu") -> PreTrainedModel:
    """The weights in `ref.path` without a head, in evaluation mode; adapters are not attached."""
    # An encoder's own pooler is not used: mean pooling represents sentences better (Reimers and Gurevych 2019).
    extra: dict[str, Any] = {"add_pooling_layer": False} if ref.shape.model_type in _POOLED else {}
    try:
        model = AutoModel.from_pretrained(
            folder_of(ref.path),
            dtype=dtype,
            attn_implementation=own_attention(ref, attention),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            **straight_to(device),
            **extra,
        )
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise
        raise BadModel(f"{ref.name} cannot be loaded: {error}", hint="Add the model again, or choose another.") from error
    without_pooler(model)
    return made_ready(model, ref, attention, device)


def without_pooler(model: PreTrainedModel) -> None:
    """Drop an encoder's own pooler, which has weights of its own and pools nothing here."""
    if getattr(model, "pooler", None) is not None and model.get_output_embeddings() is None:
        model.pooler = None  # type: ignore[assignment]  # a module of torch takes it


def load_stack(
    ref: ModelRef, dtype: torch.dtype = torch.float32, attention: str = "sdpa", device: str = "cpu", bits: int | None = None
) -> nn.Module:
    """The backbone of a classifier: a model's stack with all its adapters merged.

    Raises BadModel for a classifier that is an adapter, because its stack is not its own.
    """
    if ref.labels and ref.adapters:
        raise BadModel(f"{ref.name} {HEADED}", hint="Fine-tune the model it came from instead.")
    if not ref.adapters and bits is None:
        return load_backbone(ref, dtype, attention, device)
    return body_without_head(load_plain(ref, dtype, attention, device, bits))


def pooling_of(strategy: Strategy, architecture: str) -> Pooling:
    """How a strategy's classifier pools: by its setting, else the mean for encoders and the last token for decoders."""
    asked: Pooling | Literal["auto"] = getattr(strategy, "pooling", "auto")
    if asked != "auto":
        return asked
    return "mean" if architecture == "encoder" else "last"


class Classifier(nn.Module):
    """`backbone` is what the strategy is attached to; `head` was built by the strategy. The first `skip` tokens of every text are
    virtual tokens of a soft prompt and excluded from a mean. `normalise` scales each pooled vector to length 1. `reads` is the kind of the
    model it was made from, by which conversations are rendered; empty for one that reads texts."""

    def __init__(
        self,
        backbone: nn.Module,
        head: nn.Module,
        pooling: Pooling,
        *,
        skip: int = 0,
        normalise: bool = False,
        labels: Sequence[str] = (),
        reads: str = "",
    ) -> None:
        super().__init__()
        self.labels, self.reads = list(labels), reads
        self.backbone, self.head = backbone, head
        self.pooling, self.skip, self.normalise = pooling, skip, normalise

    def forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int], **arguments: Any) -> torch.Tensor:
        """Logits (texts, labels) for packed ids (1, T)."""
        return self.head(self.pooled(input_ids, position_ids, lengths, **arguments).to(next(self.head.parameters()).dtype))

    def pooled(self, input_ids: torch.Tensor, position_ids: torch.Tensor, lengths: list[int], **arguments: Any) -> torch.Tensor:
        """One vector per text, (texts, H)."""
        if getattr(self.backbone.config, "use_cache", None) and not getattr(self.backbone.config, "is_encoder_decoder", False):
            arguments["use_cache"] = False  # nothing is generated, so keys and values need not be kept
        states = self.backbone(input_ids=input_ids, position_ids=position_ids, **arguments).last_hidden_state
        vectors = pool(states[0], lengths, self.pooling, self.skip)
        return nn.functional.normalize(vectors, dim=-1) if self.normalise else vectors


def pool(states: torch.Tensor, lengths: list[int], how: Pooling, skip: int = 0) -> torch.Tensor:
    """One vector per text, (texts, H), from the states of packed tokens (T, H). States after the last text are padding of the pack."""
    sizes = sent(torch.tensor(lengths), states.device)
    ends = sizes.cumsum(0)
    if how == "last":
        return states[ends - 1]
    if how == "first":
        return states[ends - sizes + skip]
    # One sum for all texts: a mean for each takes 26 kernels per text on a GPU. Padding and skipped tokens go to an extra row.
    owner = np.full(len(states), len(lengths))
    owner[: sum(lengths)] = np.repeat(np.arange(len(lengths)), lengths)
    for start in np.cumsum([0, *lengths[:-1]]) if skip else ():
        owner[start : start + skip] = len(lengths)
    sums = torch.zeros(len(lengths) + 1, states.shape[1], device=states.device)
    sums = sums.index_add(0, sent(torch.from_numpy(owner), states.device), states.float())
    return (sums[:-1] / (sizes - skip)[:, None]).to(states.dtype)


def render_text(tokenizer: Any, text: str, max_length: int) -> tuple[list[int], bool]:
    """Token ids of a text with the model's special tokens ([CLS] … [SEP] for an encoder), and whether it was truncated."""
    ids = tokenizer(text, add_special_tokens=True, verbose=False)["input_ids"]
    if len(ids) <= max_length:
        return ids, False
    return tokenizer(text, add_special_tokens=True, truncation=True, max_length=max_length)["input_ids"], True


class ScoredBackbone(nn.Module):
    """A backbone with a language-model head, so that it can be scored on texts; it generates nothing."""

    def __init__(self, body: nn.Module, output: nn.Linear) -> None:
        super().__init__()
        self.body, self.output, self.config = body, output, body.config

    def get_decoder(self) -> nn.Module:
        return self.body

    def get_output_embeddings(self) -> nn.Linear:
        return self.output


def output_layer(ref: ModelRef, model: nn.Module) -> nn.Linear:
    """The language-model head of a decoder's backbone: its input embedding where they are tied, else read from the model's files.
    Raises BadModel when they hold none."""
    table = cast("nn.Embedding", plain(model).get_input_embeddings()).weight
    weight = table if plain(model).config.tie_word_embeddings else _output_weight(ref)
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    layer.weight = nn.Parameter(weight.detach().to(table.device, table.dtype), requires_grad=False)
    return layer


def plain(model: nn.Module) -> PreTrainedModel:
    """The transformers model inside a classifier and a peft wrapper."""
    body = model.backbone if isinstance(model, Classifier) else model
    return transformer(wrapped(body).get_base_model() if hasattr(body, "get_base_model") else body)


def _output_weight(ref: ModelRef) -> torch.Tensor:
    for path in sorted(folder_of(ref.path).glob("*.safetensors")):
        with safe_open(path, "pt") as file:
            if "lm_head.weight" in file.keys():  # noqa: SIM118  # the file is no mapping
                return file.get_tensor("lm_head.weight")
    raise BadModel(f"{ref.name} has no output layer.", hint="Switch off the measure of forgetting (run setting `forgetting`).")


# On disk --------------------------------------------------------------------------------------------------------------


def save_classifier(classifier: Classifier, folder: Path, labels: list[str]) -> None:
    """Save the head and what is needed to use it next to what the strategy saved of the backbone."""
    about: dict[str, Any] = {"labels": labels, "pooling": classifier.pooling, "skip": classifier.skip, "normalise": classifier.normalise}
    if classifier.reads:
        about["reads"] = classifier.reads
    save_file({name: value.detach().cpu().contiguous() for name, value in classifier.head.state_dict().items()}, folder / HEAD_FILE)
    (folder / ABOUT_FILE).write_text(json.dumps(about, ensure_ascii=False, indent=2) + "\n", encoding="utf-8")


def load_classifier(
    ref: ModelRef,
    dtype: torch.dtype = torch.float32,
    device: str = "cpu",
    attention: str = "sdpa",
    lay: Callable[[nn.Module, Adapter], nn.Module] = lay_adapter,
) -> tuple[Classifier, list[str]]:
    """A fine-tuned classifier and its labels in order; `lay` attaches its own adapter. Raises BadModel for a model that is none."""
    folder = folder_of(ref.adapters[-1].path if ref.adapters else ref.path)
    if not (folder / HEAD_FILE).is_file():
        raise BadModel(f"{ref.name} is no classifier.", hint="Choose a model that was fine-tuned on labeled rows.")
    about = json.loads((folder / ABOUT_FILE).read_text(encoding="utf-8"))
    *below, last = ref.adapters or (None,)
    # Adapters below the classifier's own were trained with the language-model head, so they are attached to the whole model.
    stack = ref.model_copy(update={"adapters": tuple(below), "labels": None})
    backbone = load_stack(stack, dtype, attention, device)
    if last is not None:
        backbone = lay(backbone, last)
    head = load_strategy(folder).head(ref.shape.hidden, len(about["labels"]))
    head.load_state_dict(load_file(folder / HEAD_FILE))
    named = {name: about[name] for name in ("skip", "normalise", "labels")}
    classifier = Classifier(backbone, head, about["pooling"], **named, reads=about.get("reads", ""))
    return classifier.to(device).eval(), about["labels"]
