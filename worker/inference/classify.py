"""Classification of texts by a fine-tuned classifier, for the playground and `POST /v1/classify`."""

from __future__ import annotations

from typing import Any, NamedTuple

from app.errors import BadData, BadRequest
from app.inference.protocol import Classified
from app.models.integrity import check
from app.run_settings import RunSettings
from app.spec import ModelRef
from worker.data.batching import BadRow, Row
from worker.inference.model_cache import ModelCache
from worker.modeling import packed_attention
from worker.modeling.classifier import Classifier, load_classifier
from worker.modeling.loading import folder_of, load_strategy, load_tokenizer
from worker.runtime import devices
from worker.runtime.device import Compute, choose
from worker.training.objectives.classification import probabilities, tokenise_texts

MAX_LOADED = 2
TOKENS_AT_ONCE = 4096


class LoadedClassifier(NamedTuple):
    tokenizer: Any
    classifier: Classifier
    labels: list[str]
    engine: Compute


_kept: ModelCache[LoadedClassifier] = ModelCache(MAX_LOADED, lambda one: one.classifier)


def classify(ref: ModelRef, texts: list[str]) -> tuple[Classified, int]:
    """The probabilities of all labels for each text, and the number of tokens read. A text longer than the model's context is
    truncated.

    Raises BadModel for a model that is no classifier or whose files changed, BadRequest for a text without a token.
    """
    tokenizer, classifier, labels, engine = loaded(ref)
    lead = [tokenizer.pad_token_id or 0] * classifier.skip
    rows = [Row(place, {"text": text}) for place, text in enumerate(texts)]
    try:
        data = tokenise_texts(tokenizer, rows, ref.shape.positions, lead)
    except BadRow as error:
        raise BadRequest(f"The model's tokenizer makes nothing of text {error.line}.", hint="Remove it.", param="input") from None
    except BadData as error:
        raise BadRequest(error.message, hint=error.hint, param="model") from None
    found = probabilities(classifier, data, TOKENS_AT_ONCE, engine)
    cut = [length >= ref.shape.positions for length in data.lengths] if data.cut else [False] * len(texts)
    return Classified(labels=labels, probabilities=found.tolist(), cut=cut), data.tokens


def loaded(ref: ModelRef) -> LoadedClassifier:
    """A classifier or a reward model, loaded now or before. Raises BadModel."""
    return _kept.get((ref.path, ref.revision, *(a.sha256 for a in ref.adapters)), lambda: _load(ref))


def _load(ref: ModelRef) -> LoadedClassifier:
    check(ref.path, ref.name, ref.revision, may_be_plain=True)
    for adapter in ref.adapters:
        check(adapter.path, ref.name, may_be_plain=True)
    strategy = load_strategy(folder_of(ref.adapters[-1].path if ref.adapters else ref.path))
    # Float32 on a CPU, as in the evaluation: texts are short, and most of the time goes into loading.
    run = RunSettings(precision="auto" if devices.gpu() else "fp32")
    engine = choose(run, strategy, {})
    classifier, labels = load_classifier(ref, engine.frozen, str(engine.device), packed_attention.NAME)
    return LoadedClassifier(load_tokenizer(ref), classifier, labels, engine)
