"""Facts about a base model before fine-tuning, for the advice: how far the data is from general text, and what prompting alone
reaches on validation rows.

*Distance* is the bits per byte of the data over those of the general probe, on matching kinds: plain texts are compared with
texts, answers with answers, both over their first bytes only, since the beginning of any text is the hardest to predict.
End-of-text tokens are not counted: where a text ends is not part of its content.

*Prompts*: zero-shot, and few-shot with solved examples (Brown et al. 2020, arXiv:2005.14165). Labels are not generated but chosen
by likelihood, less the likelihood that the same prompt gives them without a text (contextual calibration, Zhao et al. 2021,
arXiv:2102.09690). An encoder generates nothing, so its embeddings are used: the label whose name is nearest, and the label whose
examples are.
"""

from __future__ import annotations

import copy
import math
import random
import statistics
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import yaml

from app.evaluation.service import EvaluationSpec
from app.jobs.solved_examples import SolvedExample, with_examples
from app.objectives import OBJECTIVES
from app.planning.duration import EXAMPLES_A_CLASS
from worker.data import batching
from worker.data.batching import Row, Tokenised
from worker.data.chat_template import as_trained, render_prompt
from worker.evaluation.scoring import ANSWER_SECONDS, BUDGET, Reader, Say, drawn
from worker.runtime.device import Compute
from worker.scoring import held_out
from worker.scoring.answers import answers_within
from worker.scoring.forgetting import PROBE
from worker.scoring.metrics import text_scores
from worker.scoring.prompt_baseline import asked_of, class_means, examples_of, last_answer

if TYPE_CHECKING:
    from worker.training.feature_cache import FeatureProgress  # it imports scikit-learn, which most advice does not need

ANSWERED = 16
"""Validation rows that are answered: each is generated twice, which takes most of the time."""
LABELLED, EMBEDDED = 32, 400
"""Validation rows whose label is predicted by a prompt, or by an embedding."""
SHOTS_OF_LABELS = 8
MAX_LABELS = 200
MIN_BYTES = 24
"""Fewer bytes than these measure the tokenizer rather than the text."""


def advise(spec: EvaluationSpec, engine: Compute, say: Say) -> dict[str, Any]:
    """`distance` with its two components, and `zero_shot` and `few_shot` scores; None where a model or a dataset has no such
    value, with the `reason`."""
    rows = batching.read_rows(spec.dataset)
    training, held = batching.split(rows, spec.validation_fraction, spec.seed, spec.split)
    held = held or rows
    if spec.model.shape.architecture == "encoder":
        return _by_vectors(spec, engine, say, training, held)
    reader = Reader(spec.model, engine)
    say(0.05, f"Loading {spec.model.name}")
    with reader.loaded():
        say(0.1, f"Reading {min(len(rows), spec.rows)} rows")
        found = distance(reader, drawn(rows, spec.rows, spec.seed), spec.max_length)
        entry = OBJECTIVES[spec.task]
        if entry.classifies:
            prompted = _by_labels(spec, reader, say, training, held)
        elif not entry.scored:
            prompted = _none(f"{entry.title} rows have no one answer to score a prompt by.")
        else:
            prompted = _by_answers(spec, reader, say, training, held)
    return {**found, **prompted}


def _none(reason: str) -> dict[str, Any]:
    return {"zero_shot": None, "few_shot": None, "reason": reason, "prompted_rows": 0, "chance": None, "how": None}


# How unlike general text ------------------------------------------------------------------------------------------------


def distance(reader: Reader, rows: Sequence[Row], longest: int) -> dict[str, Any]:
    """Bits per byte of the rows' first bytes, of the probe's, and the one over the other."""
    read = [Row(row.line, as_trained(row.row)) for row in rows]
    texts = all("text" in row.row for row in read)
    data = reader.tokenise(read, longest)
    general = reader.tokenise(list(probe_rows(texts)), longest)
    if not len(data) or not len(general):
        return {"rows": 0, "distance": None, "data_bits_per_byte": None, "general_bits_per_byte": None}
    most = max(MIN_BYTES, int(min(statistics.median(sizes(reader, data)), statistics.median(sizes(reader, general)))))
    ours, theirs = (bits_per_byte(reader, first_bytes(reader, part, most)) for part in (data, general))
    return {
        "rows": len(data),
        "distance": ours / theirs if ours is not None and theirs is not None else None,
        "data_bits_per_byte": ours,
        "general_bits_per_byte": theirs,
        "compared": "texts" if texts else "answers",
        "first_bytes": most,
    }


def probe_rows(texts: bool) -> Iterator[Row]:
    """The probe's plain texts, or its conversations; its instructions and sums have one right answer, which says nothing about
    how unfamiliar an open one is."""
    skills = yaml.safe_load(PROBE.read_text("utf-8"))
    entries = [e for part in skills.values() for e in part if "text" in e] if texts else skills["conversation"]
    for line, entry in enumerate(entries, start=1):
        if texts:
            yield Row(line, {"text": entry["text"]})
        else:
            turns = [{"role": role, "content": turn[role]} for turn in entry["say"] for role in ("user", "assistant")]
            yield Row(line, {"messages": turns})


def sizes(reader: Reader, data: Tokenised) -> list[int]:
    """UTF-8 bytes of the tokens with a loss, for each row."""
    return [len(_words(reader, data, row).encode()) for row in range(len(data))]


def _words(reader: Reader, data: Tokenised, row: int) -> str:
    part = slice(data.starts[row], data.starts[row + 1])
    return reader.tokenizer.decode(data.ids[part][data.trained[part]].tolist(), skip_special_tokens=True)


def first_bytes(reader: Reader, data: Tokenised, most: int) -> Tokenised:
    """The same rows with a loss on at most the first `most` bytes of each, and on no token that only marks an end."""
    special = set(reader.tokenizer.all_special_ids) | set(reader.tokenizer.added_tokens_decoder)
    trained = data.trained.copy()
    for row in range(len(data)):
        said = 0
        for place in range(data.starts[row], data.starts[row + 1]):
            if trained[place]:
                token = int(data.ids[place])
                trained[place] = token not in special and said < most
                said += 0 if token in special else max(1, len(reader.tokenizer.decode([token]).encode()))
    return Tokenised(data.ids, trained, data.starts, data.lines, data.cut, data.skipped)


def bits_per_byte(reader: Reader, data: Tokenised) -> float | None:
    size = sum(reader.trained_bytes(data))
    if not size or not data.trained.any():
        return None
    nats = held_out.score_rows(reader.model, data, BUDGET, reader.engine).nats
    return math.fsum(nats) / math.log(2) / size


# What a prompt alone reaches: answers -----------------------------------------------------------------------------------


def _by_answers(spec: EvaluationSpec, reader: Reader, say: Say, training: Sequence[Row], held: list[Row]) -> dict[str, Any]:
    kind = spec.model.kind
    asked = [one for _, one in asked_of(drawn(held, ANSWERED, spec.seed), kind)]
    if not asked:
        return _none("These rows are plain texts: they hold no question to put to the model.")
    examples = examples_of(training, kind, spec.seed)
    found: dict[str, dict[str, float] | None] = {}
    for place, (name, shown) in enumerate((("zero_shot", []), ("few_shot", examples))):
        if name == "few_shot" and not shown:
            found[name] = None
            continue
        say(0.3 + 0.35 * place, f"Answering {len(asked)} validation rows" + (" with examples before each" if shown else ""))
        found[name] = _answered(spec, reader, asked, shown)
    return {**found, "prompted_rows": len(asked), "shots": len(examples), "chance": None, "how": "answers", "reason": None}


def _answered(spec: EvaluationSpec, reader: Reader, asked: Sequence[SolvedExample], examples: Sequence[SolvedExample]) -> dict[str, float]:
    """Scores of generated answers, and the bits per byte of the references."""
    room = reader.ref.shape.positions - spec.answer_tokens - len(reader.lead)
    questions, rows = [], []
    for line, one in enumerate(asked, start=1):
        shown = list(examples)
        while True:
            prompt = with_examples(one.prompt, shown)
            ids = render_prompt(reader.tokenizer, reader.ref.kind, prompt)[1]
            if len(ids) <= room or not shown:
                break
            shown.pop()
        questions.append(held_out.HeldOutPrompt("", ids[-room:], one.reference))
        rows.append(Row(line, last_answer(prompt, one.reference)))
    told = answers_within(ANSWER_SECONDS, reader.model, reader.tokenizer, questions, spec.answer_tokens, reader.engine, reader.lead)
    answered = [(text, one.reference) for text, one in zip(told, asked, strict=True) if text is not None]
    scores = text_scores([text for text, _ in answered], [reference for _, reference in answered])
    bits = bits_per_byte(reader, reader.tokenise(rows, reader.ref.shape.positions))
    return scores | ({"bits_per_byte": bits} if bits is not None else {})


# What a prompt alone reaches: labels ------------------------------------------------------------------------------------


def _by_labels(spec: EvaluationSpec, reader: Reader, say: Say, training: Sequence[Row], held: list[Row]) -> dict[str, Any]:
    labels = sorted({row.row["label"] for row in (*training, *held)})
    if not 2 <= len(labels) <= MAX_LABELS:
        return _none(f"{len(labels)} labels are too {'few' if len(labels) < 2 else 'many'} to try one by one.")
    asked = drawn(held, LABELLED, spec.seed)
    examples = _balanced(training, SHOTS_OF_LABELS, spec.seed)
    found: dict[str, Any] = {}
    for place, (name, shown) in enumerate((("zero_shot", []), ("few_shot", examples))):
        if name == "few_shot" and not shown:
            found[name] = None
            continue
        guess = LabelScorer(reader, labels, shown)
        hits = 0
        for done, row in enumerate(asked):
            say(
                0.3 + 0.35 * (place + done / len(asked)),
                f"Choosing labels for {len(asked)} validation rows" + (" after examples" if shown else ""),
            )
            hits += labels[guess(row.row["text"])] == row.row["label"]
        found[name] = {"accuracy": hits / len(asked)}
    return {
        **found,
        "prompted_rows": len(asked),
        "shots": len(examples),
        "chance": _chance(training, asked),
        "how": "labels",
        "reason": None,
    }


def _chance(training: Sequence[Row], asked: Sequence[Row]) -> float:
    """Accuracy of always predicting the most frequent label."""
    ((common, _),) = Counter(row.row["label"] for row in (training or asked)).most_common(1)
    return sum(row.row["label"] == common for row in asked) / len(asked)


def _balanced(rows: Sequence[Row], count: int, seed: int) -> list[Row]:
    """Up to `count` rows, one of each label before a second of any."""
    draw = random.Random(seed)
    groups: dict[str, list[Row]] = {}
    for row in draw.sample(list(rows), len(rows)):
        groups.setdefault(row.row["label"], []).append(row)
    found: list[Row] = []
    while groups and len(found) < count:
        for label in list(groups):
            found.append(groups[label].pop())
            if not groups[label]:
                del groups[label]
    return draw.sample(found[:count], min(count, len(found)))


class LabelScorer:
    """Predicts the label of a text under a prompt, by the likelihood of the label's tokens after it."""

    AT_ONCE = 8
    LISTED_CHARACTERS = 1500
    """Labels are listed in the prompt when they have at most this many characters."""

    def __init__(self, reader: Reader, labels: Sequence[str], examples: Sequence[Row]) -> None:
        self.reader, self.labels, self.examples = reader, list(labels), list(examples)
        lead = "" if reader.ref.kind != "generic" else " "
        self.ids = [reader.tokenizer(lead + label, add_special_tokens=False)["input_ids"] for label in labels]
        self.listed = ", ".join(labels) if sum(map(len, labels)) < self.LISTED_CHARACTERS else ""
        self.prior = self._likelihoods("N/A")

    def __call__(self, text: str) -> int:
        return int((self._likelihoods(text) - self.prior).argmax())

    def _prompt(self, text: str, examples: Sequence[Row]) -> list[int]:
        named = f"Choose the label that fits the text. Labels: {self.listed}." if self.listed else "Name the label that fits the text."
        if self.reader.ref.kind == "generic":
            shown = "".join(f"Text: {row.row['text']}\nLabel: {row.row['label']}\n\n" for row in examples)
            return render_prompt(self.reader.tokenizer, "generic", f"{named}\n\n{shown}Text: {text}\nLabel:")[1]
        turns = [{"role": "system", "content": f"{named} Answer with the label alone."}]
        for row in examples:
            turns += [{"role": "user", "content": row.row["text"]}, {"role": "assistant", "content": row.row["label"]}]
        return render_prompt(self.reader.tokenizer, self.reader.ref.kind, [*turns, {"role": "user", "content": text}])[1]

    @torch.inference_mode()
    def _likelihoods(self, text: str) -> np.ndarray:
        """Log-probability of each label, (labels,), after the prompt, whose keys and values are computed once."""
        reader, shown = self.reader, list(self.examples)
        room = reader.ref.shape.positions - max(map(len, self.ids)) - len(reader.lead)
        while len(ids := self._prompt(text, shown)) > room and shown:
            shown.pop()
        model, device = reader.model, reader.engine.device
        plain = held_out.plain_model(model)
        before = plain.config._attn_implementation
        plain.set_attn_implementation("sdpa")
        try:
            with held_out.evaluating(model), reader.engine.autocast():
                prompt = torch.tensor([[*reader.lead, *ids[-room:]]], device=device)
                first = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
                start = first.logits[0, -1].float().log_softmax(-1)
                found = [
                    self._rest(model, first.past_key_values, start, self.ids[i : i + self.AT_ONCE])
                    for i in range(0, len(self.ids), self.AT_ONCE)
                ]
        finally:
            plain.set_attn_implementation(before)
        return np.concatenate(found)

    def _rest(self, model: torch.nn.Module, cache: Any, start: torch.Tensor, labels: Sequence[list[int]]) -> np.ndarray:
        """Log-probabilities of a batch of labels; shorter ones are padded on the right, where causal attention does not see it."""
        scores = torch.stack([start[ids[0]] for ids in labels])
        longest = max(map(len, labels))
        if longest > 1:
            filled = torch.tensor([[*ids, *[ids[-1]] * (longest - len(ids))] for ids in labels], device=start.device)
            own = copy.deepcopy(cache)
            own.batch_repeat_interleave(len(labels))
            logs = model(input_ids=filled[:, :-1], past_key_values=own, use_cache=True).logits.float().log_softmax(-1)
            each = logs.gather(-1, filled[:, 1:, None])[..., 0]  # (labels, longest - 1)
            real = torch.tensor([[place < len(ids) for place in range(1, longest)] for ids in labels], device=start.device)
            scores = scores + (each * real).sum(1)
        return scores.double().cpu().numpy()


# What vectors alone reach -----------------------------------------------------------------------------------------------


def _by_vectors(spec: EvaluationSpec, engine: Compute, say: Say, training: Sequence[Row], held: list[Row]) -> dict[str, Any]:
    """An encoder: no distance, since it predicts no next token; labels by nearest embedding."""
    nothing = {"rows": 0, "distance": None, "data_bits_per_byte": None, "general_bits_per_byte": None}
    if not OBJECTIVES[spec.task].classifies:
        return nothing | _none(f"{spec.model.name} is an encoder: it writes no text, so there is no prompt to try.")
    from worker.modeling.classifier import Classifier, load_backbone
    from worker.modeling.loading import load_tokenizer
    from worker.training.feature_cache import embed

    labels = sorted({row.row["label"] for row in (*training, *held)})
    asked, examples = drawn(held, EMBEDDED, spec.seed), _balanced(training, EXAMPLES_A_CLASS * len(labels), spec.seed)
    say(0.1, f"Loading {spec.model.name}")
    from worker.modeling import packed_attention

    backbone = load_backbone(spec.model, engine.frozen, packed_attention.NAME, str(engine.device))
    reader = Classifier(backbone, torch.nn.Identity(), "mean", normalise=True)
    names = [label.replace("_", " ").replace("-", " ") for label in labels]
    texts = [*names, *(row.row["text"] for row in examples), *(row.row["text"] for row in asked)]
    longest = min(spec.max_length, spec.model.shape.positions)
    making = embed(reader, load_tokenizer(spec.model), texts, engine, max_length=longest)
    vectors = _told(making, lambda done, of: say(0.2 + 0.75 * done / of, f"Reading {of} texts"))
    ours = vectors[len(names) + len(examples) :]
    centres = class_means(
        vectors[len(names) : len(names) + len(examples)], [labels.index(row.row["label"]) for row in examples], len(labels)
    )
    truth = np.asarray([labels.index(row.row["label"]) for row in asked])
    few = {"accuracy": float(((ours @ centres.T).argmax(1) == truth).mean())} if examples else None
    zero = {"accuracy": float(((ours @ vectors[: len(names)].T).argmax(1) == truth).mean())}
    shots = min(EXAMPLES_A_CLASS, max(Counter(row.row["label"] for row in examples).values(), default=0))
    return nothing | {
        "zero_shot": zero, "few_shot": few, "prompted_rows": len(asked), "shots": shots, "chance": _chance(training, asked),
        "how": "vectors", "reason": None,
    }  # fmt: skip


def _told(making: Generator[FeatureProgress, None, np.ndarray], say: Callable[[int, int], None]) -> np.ndarray:
    """Exhaust the generator and return its result; after each step `say` gets the number of texts done and of all."""
    while True:
        try:
            progress = next(making)
        except StopIteration as done:
            return done.value
        say(progress.done, progress.texts)
