"""Whether an exported file gives the answers of the studio's model, in the program that it is for.

A file can be wrong in ways that no reader of it sees: another chat template, an end token that does not end, query rows in another
order, an adapter that was left out. So each file is run, on held-out rows, and compared with the model that was tuned:

* the token ids of the rendered prompts, by the file's own tokenizer and template;
* the distribution of the next token at some places of the answers: KL(studio ‖ file) in nats, and how often the first choice is one;
* whether the tokens that end an answer end it there.

What differs is told apart by what does not: `faults` gives the cause in words.
"""

from __future__ import annotations

import json
import math
import os
import resource
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from app.errors import BadData
from app.settings import PROJECT

TOP = 1000
"""Tokens whose probabilities are asked for; what all others have together is compared as one."""
PLACES = 6
"""Places of each row's answer that are compared."""
MAX_TOKENS = 512
"""Longer rows are cut: a fault shows at once or never."""
SECONDS = 3600
LIMITS = {
    "F32": 1e-4, "F16": 1e-4, "BF16": 0.01, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K_M": 0.08, "Q4_K_M": 0.25, "Q4_0": 0.5, "IQ4_XS": 0.3,
}  # fmt: skip
"""KL in nats that rounding to a type explains; small models lose the most. More is a fault of the weights, or a type too coarse."""
SPEED_TOKENS = 32
EXACT = ("F32", "F16", "BF16", "Q8_0")
KEEPS_SCORE = 0.01
"""A type keeps the score when the loss on the answers rises by at most this share,"""
SAME_FIRST = 0.9
"""and the first choice is the same at this share of the places: on a few rows the loss of a coarse type can be lower by chance."""


class Question(NamedTuple):
    """One held-out row: what is asked, as text and ids by the studio's own code, and the ids and places of its answer."""

    asked: str | list[dict[str, Any]]
    text: str
    prompt: list[int]
    ids: list[int]
    places: list[int]
    """Each is the place in `ids` of a token whose prediction is compared."""

    @property
    def probes(self) -> list[list[int]]:
        """What the model has read at each place. The first is one token alone, which attends to nothing but itself."""
        return [self.ids[:1], *(self.ids[:place] for place in self.places)]

    @property
    def answers(self) -> list[int]:
        return [self.ids[1], *(self.ids[place] for place in self.places)]


class Reference(NamedTuple):
    """The studio's side. `logprobs` of each question is (probes, V); `base` is the same of the model without its last adapter."""

    questions: list[Question]
    logprobs: list[np.ndarray]
    base: list[np.ndarray] | None
    ends: dict[int, str]
    """Tokens that end an answer, and how they are written."""
    bos: str | None


class Fault(NamedTuple):
    cause: str
    """template, tokens, bos, end, positions, adapter or weights."""
    message: str


# The studio's side ----------------------------------------------------------------------------------------------------


def ask(tokenizer: Any, kind: str, rows: Sequence[dict[str, Any]]) -> list[Question]:
    """Normalized rows as questions; rows that cannot be rendered or have no answer are left away."""
    from app.errors import StudioError
    from worker.data.chat_template import render_prompt, render_row, sample_of

    found = []
    for row in rows:
        try:
            asked, _ = sample_of(row, kind)
            if not isinstance(asked, str) and not tokenizer.chat_template:
                continue  # a file without a template is given conversations in whatever form its program likes
            text, prompt = render_prompt(tokenizer, kind, asked)
            ids, trained, _ = render_row(tokenizer, row, kind, MAX_TOKENS)
        except StudioError:
            continue
        here = [place for place, learned in enumerate(trained) if learned and place > 0]
        if here and prompt and len(ids) > 1 and len(prompt) <= MAX_TOKENS:
            step = max(1, len(here) // PLACES)
            found.append(Question(asked, text, prompt, ids, here[::step][:PLACES]))
    return found


def logprobs(model: Any, questions: Sequence[Question]) -> list[np.ndarray]:
    """Log probabilities of the next token at every probe: for each question (probes, V) float32."""
    import torch

    found = []
    with torch.inference_mode():
        for question in questions:
            logits = model(torch.tensor([question.ids])).logits[0]
            at = [len(probe) - 1 for probe in question.probes]
            found.append(logits[-len(question.ids) :][at].float().log_softmax(-1).numpy())
    return found


def reference(
    load: Callable[[], Any], tokenizer: Any, kind: str, rows: Sequence[dict[str, Any]], load_base: Callable[[], Any] | None = None
) -> Reference:
    """What the studio's model does on the rows; the two models are in memory one after the other. Raises BadData when none of the rows
    can be asked."""
    from worker.data.chat_template import stop_ids

    questions = ask(tokenizer, kind, rows)
    if not questions:
        raise BadData("None of the rows can be asked of the model, so its files cannot be compared with it.", hint="Report this.")
    model = load()
    ends = {i: tokenizer.convert_ids_to_tokens(i) for i in stop_ids(tokenizer, getattr(model, "generation_config", None))}
    tuned = logprobs(model, questions)
    del model
    return Reference(questions, tuned, logprobs(load_base(), questions) if load_base else None, ends, tokenizer.bos_token)


# The file's side ------------------------------------------------------------------------------------------------------


def run(file: Path, ours: Reference, work: Path, lora: Path | None = None) -> dict[str, Any]:
    """What the file does in llama.cpp, in a process with limits. Raises BadData when it does not load or does not come to its end."""
    order, answer = work / "parity.json", work / "parity-answer.json"
    answer.unlink(missing_ok=True)
    rows = [{("text" if isinstance(q.asked, str) else "messages"): q.asked, "probes": q.probes} for q in ours.questions]
    asked = {"file": str(file), "lora": str(lora) if lora else None, "threads": threads(), "top": TOP}
    order.write_text(json.dumps({**asked, "rows": rows, "ends": list(ours.ends), "speed": ours.questions[0].prompt}))
    command = [sys.executable, "-m", "worker.exporters._llama_cpp", str(order), str(answer)]
    try:
        done = subprocess.run(command, cwd=PROJECT, capture_output=True, timeout=SECONDS, check=False, preexec_fn=_limit)
    except subprocess.TimeoutExpired:
        raise BadData(f"{file.name} took longer than {SECONDS} seconds in llama.cpp.", hint="Try again when less is running.") from None
    if done.returncode != 0 or not answer.is_file():
        said = done.stderr.decode("utf-8", "replace").strip().splitlines()
        why = next((line for line in reversed(said) if "error" in line.lower() or "assert" in line.lower()), said[-1] if said else "")
        raise BadData(f"llama.cpp cannot run {file.name}: {why[:300]}", hint="Choose another type or format.", code="does_not_load")
    heard: dict[str, Any] = json.loads(answer.read_text())
    return heard


def run_folder(folder: Path, ours: Reference) -> dict[str, Any]:
    """The same of a folder in transformers, computed in float32: the answers of its weights, its tokenizer, template and generation
    config."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    ).eval()
    rows: list[dict[str, Any]] = []
    for question, found in zip(ours.questions, logprobs(model, ours.questions), strict=True):
        try:
            framed = isinstance(question.asked, str)
            text: Any = question.asked
            if not framed:
                text = tokenizer.apply_chat_template(text, tokenize=False, add_generation_prompt=True)
        except Exception as error:  # whatever a template raises
            rows.append({"text": None, "error": str(error)[:400], "tokens": [], "probes": []})
            continue
        top = [torch.from_numpy(logp).topk(min(TOP, len(logp))) for logp in found]
        probes = [list(zip(one.indices.tolist(), one.values.tolist(), strict=True)) for one in top]
        rows.append({"text": text, "tokens": tokenizer(text, add_special_tokens=framed).input_ids, "probes": probes})
    named = model.generation_config.eos_token_id
    ends = {str(token): token in (named if isinstance(named, list) else [named]) for token in ours.ends}
    began, asked = time.monotonic(), torch.tensor([ours.questions[0].prompt])
    with torch.inference_mode():
        made = model.generate(
            asked, attention_mask=torch.ones_like(asked), max_new_tokens=SPEED_TOKENS, min_new_tokens=SPEED_TOKENS, do_sample=False
        )
    speed = (made.shape[1] - asked.shape[1]) / (time.monotonic() - began)
    return {"rows": rows, "ends": ends, "tokens_per_second": speed}


def threads() -> int:
    """As many as torch takes: llama.cpp's threads wait for each other in a loop, so one too many makes all of them slow."""
    return int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))


def _limit() -> None:
    seconds = SECONDS * threads()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# The comparison -------------------------------------------------------------------------------------------------------


class Compared(NamedTuple):
    """The distributions of one side against a file's: KL at each place, at a single token, agreement of the first choice, losses."""

    kl: float
    first_kl: float
    top1: float
    loss: float
    loss_here: float


def compare(questions: Sequence[Question], ours: Sequence[np.ndarray], rows: Sequence[dict[str, Any]]) -> Compared:
    """KL(ours ‖ file) averaged over the places, and what goes with it."""
    kl, first, same, theirs, here = [], [], [], [], []
    for question, expected, row in zip(questions, ours, rows, strict=True):
        for place, (logp, pairs, answer) in enumerate(zip(expected, row["probes"], question.answers, strict=True)):
            found = divergence(logp, pairs)
            if place == 0:
                first.append(found)
                continue
            kl.append(found)
            if not math.isfinite(found):
                continue
            same.append(pairs[0][0] == int(logp.argmax()))
            # Below the last listed token only what all have together is known. Both losses are cut there: to leave such answers out
            # would leave out those that the file finds unlikely, and favor it.
            least = min(q for _, q in pairs)
            here.append(-max(float(logp[answer]), least))
            theirs.append(-dict(map(tuple, pairs)).get(answer, least))
    return Compared(*(float(np.mean(values)) if values else float("nan") for values in (kl, first, same, theirs, here)))


def divergence(logp: np.ndarray, pairs: Sequence[Sequence[float]]) -> float:
    """KL in nats of a distribution over all tokens from one that is known for some, (id, logprob) each: all others count as one. Infinite
    where the file gives what is no probability, as after an overflow."""
    if not pairs or any(q is None or not math.isfinite(q) for _, q in pairs):
        return math.inf
    at = np.array([int(i) for i, _ in pairs])
    logq = np.array([q for _, q in pairs], np.float64)
    p = logp.astype(np.float64)
    total = float(np.sum(np.exp(p[at]) * (p[at] - logq)))
    rest_p = max(0.0, 1.0 - float(np.exp(p[at]).sum()))
    if len(at) < len(p) and rest_p > 0:
        total += rest_p * (float(np.log(rest_p)) - _rest(pairs))
    return max(0.0, total)


def _rest(pairs: Sequence[Sequence[float]]) -> float:
    """Logarithm of what the tokens that are not among the pairs have together."""
    left = 1.0 - float(np.exp(np.array([q for _, q in pairs], np.float64)).sum())
    return float(np.log(max(left, 1e-12)))


def report(kind: str, file: Path, ours: Reference, heard: dict[str, Any]) -> dict[str, Any]:
    """One line of the parity table of a file or a folder, with its faults."""
    whole = all(row["text"] is not None for row in heard["rows"])
    found = compare(ours.questions, ours.logprobs, heard["rows"]) if whole else None
    same = sum(row["tokens"] == q.prompt for q, row in zip(ours.questions, heard["rows"], strict=True))
    return {
        "type": kind,
        "bytes": file.stat().st_size if file.is_file() else sum(path.stat().st_size for path in file.glob("*.safetensors")),
        "prompts": len(ours.questions),
        "identical": same,
        "places": sum(len(q.places) for q in ours.questions),
        "kl": _finite(found and found.kl),
        "top1": _finite(found and found.top1),
        "loss": _finite(found and found.loss),
        "loss_here": _finite(found and found.loss_here),
        "limit": LIMITS[kind],
        "tokens_per_second": heard["tokens_per_second"],
        "faults": [fault._asdict() for fault in faults(kind, ours, heard)],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def smallest(lines: Sequence[dict[str, Any]]) -> str | None:
    """The smallest type that keeps the score: its loss on the answers is at most a hundredth above the studio's, and nine of ten tokens are
    the same."""
    sound = [x for x in lines if not x["faults"] and None not in (x["loss"], x["top1"]) and x["top1"] >= SAME_FIRST]
    kept = [x for x in sound if x["loss"] <= x["loss_here"] * (1 + KEEPS_SCORE)]
    return min(kept, key=lambda line: line["bytes"])["type"] if kept else None


# Causes ---------------------------------------------------------------------------------------------------------------


def faults(kind: str, ours: Reference, heard: dict[str, Any]) -> list[Fault]:
    """What is wrong with a file, the cause in words; empty for a good one."""
    found = [fault for q, row in zip(ours.questions, heard["rows"], strict=True) if (fault := _prompt_fault(q, row, ours.bos))][:1]
    for token, written in ours.ends.items():
        if not heard["ends"][str(token)]:
            words = (
                f"The token {written} (id {token}) ends an answer in the studio, and the file does not name it as an end: answers run on."
            )
            found.append(Fault("end", words))
    if all(row["text"] is not None for row in heard["rows"]):
        found += _weights_fault(kind, ours, heard["rows"])
    return found


def _prompt_fault(question: Question, row: dict[str, Any], bos: str | None) -> Fault | None:
    """Why the ids of a prompt are others than the studio's."""
    heard, ids = row["tokens"], question.prompt
    if row["text"] is None:
        return Fault("template", f"The file's chat template cannot be rendered: {row['error']}")
    if heard == ids:
        return None
    if heard[1:] == ids:
        return Fault("bos", f"The file puts the token {heard[0]} (BOS) before every text, and the studio does not.")
    if heard == ids[1:]:
        return Fault("bos", f"The studio puts the token {ids[0]} (BOS) before every text, and the file does not.")
    if heard[1:] == ids[1:]:
        return Fault("bos", f"The file begins every text with the token {heard[0]} (BOS), and the studio with {ids[0]}.")
    theirs, text = (t.removeprefix(bos) if bos else t for t in (row["text"], question.text))
    if theirs != text:
        at = _first_difference(theirs, text)
        where = f"from character {at} on: {theirs[at : at + 30]!r} in the file, {text[at : at + 30]!r} in the studio"
        return Fault("template", f"The chat template writes another prompt {where}.")
    at = _first_difference(heard, ids)
    differ = f"token {at} of a prompt is {heard[at : at + 1]} in the file and {ids[at : at + 1]} in the studio"
    return Fault("tokens", f"The same text becomes other tokens, so the tokenizer's rule or vocabulary differs: {differ}.")


def _first_difference(a: Sequence[Any], b: Sequence[Any]) -> int:
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b)))


def _weights_fault(kind: str, ours: Reference, rows: Sequence[dict[str, Any]]) -> list[Fault]:
    """Why the answers differ more than rounding explains."""
    tuned = compare(ours.questions, ours.logprobs, rows)
    if ours.base is not None:
        base = compare(ours.questions, ours.base, rows)
        if math.isfinite(tuned.kl) and base.kl < 0.5 * tuned.kl and tuned.kl > LIMITS["Q8_0"] / 10:
            words = f"The file answers as the base does (KL {base.kl:.2g} nats) and not as the fine-tuned model (KL {tuned.kl:.2g})"
            return [Fault("adapter", f"{words}: the adapter was not applied.")]
    if not math.isfinite(tuned.kl):
        return [Fault("weights", "The file computes no numbers for some texts: its weights are damaged, or too large for its type.")]
    if not tuned.kl > LIMITS[kind]:
        return []
    if tuned.first_kl <= max(LIMITS[kind] / 10, 0.02 * tuned.kl):
        words = f"A single token is answered as in the studio (KL {tuned.first_kl:.2g} nats) and longer texts are not (KL {tuned.kl:.2g})"
        return [Fault("positions", f"{words}: query and key rows are in another order than the rotary embedding, or its base differs.")]
    limit = f"KL {tuned.kl:.2g} nats, and rounding to {kind} explains {LIMITS[kind]:g}"
    if kind in EXACT:
        return [Fault("weights", f"The weights of the file are not those of the model: {limit}.")]
    return [Fault("weights", f"{kind} is too coarse for this model, or its weights differ: {limit}.")]
