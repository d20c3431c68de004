"""Whether an exported file gives the answers of the studio's model, in the program that it is for.

A file can be wrong in ways that no reader of it sees: another chat template, an end token that does not end, query rows in another
order, an adapter that was left out. So each file is run, on held-out rows, and compared with the model that was tuned:

* the token ids of the rendered prompts, by the file's own tokenizer and template;
* the distribution of the next token at some places of the answers: KL(studio ‖ file) in nats, and how often the first choice is one;
* whether the tokens that end an answer end it there;
* whole greedy answers (`_answers.py`), and the score of the task (`_score.py`).

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
from worker.exporters import _answers, _score

TOP = 1000
"""Tokens whose probabilities are asked for; what all others have together is compared as one."""
ROWS, PLACES = 8, 6
"""Rows whose next tokens are compared, and places of each row's answer that are compared."""
MAX_TOKENS = 512
"""Longer rows are cut: a fault shows at once or never."""
SECONDS = 3600
LIMITS = {
    "F32": 1e-4, "F16": 1e-4, "BF16": 0.01, "Q8_0": 0.01, "Q6_K": 0.03, "Q5_K_M": 0.08, "Q4_K_M": 0.25, "Q4_0": 0.5, "IQ4_XS": 0.3,
}  # fmt: skip
"""KL in nats that rounding to a type explains; small models lose the most. More is a fault of the weights, or a type too coarse."""
FAR_OFF = 4
"""Times the limit of a coarse type: rounding does not explain so much."""
SPEED_TOKENS = 32
EXACT = ("F32", "F16", "BF16", "Q8_0")


class HeldOutRow(NamedTuple):
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


class Reference(NamedTuple):
    """The studio's side. `logprobs` of each question is (probes, V); `base` is the same of the model without its last adapter."""

    questions: list[HeldOutRow]
    logprobs: list[np.ndarray]
    base: list[np.ndarray] | None
    ends: dict[int, str]
    """Tokens that end an answer, and how they are written."""
    bos: str | None
    prompts: Sequence[_answers.GreedyPrompt] = ()
    answers: Sequence[_answers.GreedyAnswer] = ()
    task: _score.Task = _score.Task([], [], [])
    scored: _score.TaskScores = _score.TaskScores([], [])
    slides: bool = False
    """Whether layers see a sliding window: with its cache of prompts llama.cpp continues a prompt of such a model wrongly."""

    @property
    def told(self) -> list[dict[str, str]]:
        """The prompts and the answers of the studio, as they are shown."""
        return [{"prompt": one.shown, "answer": said.text} for one, said in zip(self.prompts, self.answers, strict=True)]


class ParityFault(NamedTuple):
    cause: str
    """template, tokens, bos, end, positions, adapter or weights."""
    message: str


# The studio's side ----------------------------------------------------------------------------------------------------


def ask(tokenizer: Any, kind: str, rows: Sequence[dict[str, Any]]) -> list[HeldOutRow]:
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
            found.append(HeldOutRow(asked, text, prompt, ids, here[::step][:PLACES]))
    return found


def logprobs(model: Any, questions: Sequence[HeldOutRow]) -> list[np.ndarray]:
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
    load: Callable[[], Any],
    tokenizer: Any,
    kind: str,
    rows: Sequence[dict[str, Any]],
    load_base: Callable[[], Any] | None = None,
    questions: Sequence[str | list[dict[str, Any]]] = (),
) -> Reference:
    """What the studio's model does on the rows, and how it answers `questions`, or what the rows ask; the two models are in memory one
    after the other. Raises BadData when none of the rows can be asked."""
    from worker.data.chat_template import stop_ids

    compared = ask(tokenizer, kind, _score.spread(rows, ROWS))
    if not compared:
        raise BadData("None of the rows can be asked of the model, so its files cannot be compared with it.", hint="Report this.")
    model = load()
    ends = {i: tokenizer.convert_ids_to_tokens(i) for i in stop_ids(tokenizer, getattr(model, "generation_config", None))}
    prompts = _answers.prompts(tokenizer, kind, questions or [one.asked for one in compared], MAX_TOKENS)
    task = _score.task(tokenizer, kind, rows, MAX_TOKENS)
    tuned, answers = logprobs(model, compared), _answers.greedy(model, tokenizer, prompts, ends)
    scored = _score.TaskScores(_score.nats(model, task.rows), [one.text for one in _answers.greedy(model, tokenizer, task.prompts, ends)])
    slides = "sliding_attention" in (getattr(model.config, "layer_types", None) or ())
    del model
    base = logprobs(load_base(), compared) if load_base else None
    return Reference(compared, tuned, base, ends, tokenizer.bos_token, prompts, answers, task, scored, slides)


# The file's side ------------------------------------------------------------------------------------------------------


def run(file: Path, ours: Reference, work: Path, lora: Path | None = None) -> dict[str, Any]:
    """What the file does in llama.cpp, in a process with limits. Raises BadData when it does not load or does not come to its end."""
    order, answer = work / "parity.json", work / "parity-answer.json"
    answer.unlink(missing_ok=True)
    rows = [{("text" if isinstance(q.asked, str) else "messages"): q.asked, "probes": q.probes} for q in ours.questions]
    asked: dict[str, Any] = {"file": str(file), "lora": str(lora) if lora else None, "threads": threads(), "top": TOP}
    asked |= {"cache": not ours.slides, "rows": rows, "ends": list(ours.ends), "speed": ours.questions[0].prompt}
    asked |= {"answers": [{"ids": one.ids, "most": one.most} for one in (*ours.prompts, *ours.task.prompts)]}
    order.write_text(json.dumps({**asked, "scored": [row._asdict() for row in ours.task.rows]}))
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
    heard["answers"] = [_answers.heard(said, ours.ends) for said in heard["answers"]]
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
    here = {token for token in ours.ends if ends[str(token)]}
    answers = [*_answers.greedy(model, tokenizer, ours.prompts, here), *_answers.greedy(model, tokenizer, ours.task.prompts, here)]
    scored = _score.nats(model, ours.task.rows)
    return {"rows": rows, "ends": ends, "tokens_per_second": speed, "answers": answers, "scored": scored}


def threads() -> int:
    """As many as torch takes: llama.cpp's threads wait for each other in a loop, so one too many makes all of them slow."""
    return int(os.environ.get("OMP_NUM_THREADS", "0")) or len(os.sched_getaffinity(0))


def _limit() -> None:
    seconds = SECONDS * threads()
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


# The comparison -------------------------------------------------------------------------------------------------------


class Divergence(NamedTuple):
    """The distributions of one side against a file's: KL at each place, at a single token, and agreement of the first choice."""

    kl: float
    first_kl: float
    top1: float


def compare(ours: Sequence[np.ndarray], rows: Sequence[dict[str, Any]]) -> Divergence:
    """KL(ours ‖ file) averaged over the places, and what goes with it."""
    kl, first, same = [], [], []
    for expected, row in zip(ours, rows, strict=True):
        for place, (logp, pairs) in enumerate(zip(expected, row["probes"], strict=True)):
            found = divergence(logp, pairs)
            if place == 0:
                first.append(found)
                continue
            kl.append(found)
            if math.isfinite(found):
                same.append(pairs[0][0] == int(logp.argmax()))
    return Divergence(*(float(np.mean(values)) if values else float("nan") for values in (kl, first, same)))


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
    found = compare(ours.logprobs, heard["rows"]) if whole else None
    same = sum(row["tokens"] == q.prompt for q, row in zip(ours.questions, heard["rows"], strict=True))
    answers = _answers.beside(ours.answers, heard["answers"][: len(ours.answers)])
    there = _score.TaskScores(heard["scored"], [said.text for said in heard["answers"][len(ours.answers) :]])
    wrong = faults(kind, ours, heard)
    return {
        "type": kind,
        "bytes": file.stat().st_size if file.is_file() else sum(path.stat().st_size for path in file.glob("*.safetensors")),
        "prompts": len(ours.questions),
        "identical": same,
        "places": sum(len(q.places) for q in ours.questions),
        "kl": _finite(found and found.kl),
        "top1": _finite(found and found.top1),
        "limit": LIMITS[kind],
        "answers": answers,
        "same_answers": sum(one["parts_at"] is None for one in answers),
        "score": _score.compared(ours.task, ours.scored, there),
        "tokens_per_second": heard["tokens_per_second"],
        "verdict": "not as the model" if wrong else _answers.verdict(answers),
        "faults": [fault._asdict() for fault in wrong],
    }


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def smallest(lines: Sequence[dict[str, Any]]) -> str | None:
    """The smallest type that keeps the score of the task (`_score.py`)."""
    kept = [line for line in lines if not line["faults"] and line["score"] and line["score"]["kept"]]
    return min(kept, key=lambda line: line["bytes"])["type"] if kept else None


# Causes ---------------------------------------------------------------------------------------------------------------


def faults(kind: str, ours: Reference, heard: dict[str, Any]) -> list[ParityFault]:
    """What is wrong with a file, the cause in words; empty for a good one."""
    found = [fault for q, row in zip(ours.questions, heard["rows"], strict=True) if (fault := _prompt_fault(q, row, ours.bos))][:1]
    for token, written in ours.ends.items():
        if not heard["ends"][str(token)]:
            words = (
                f"The token {written} (id {token}) ends an answer in the studio, and the file does not name it as an end: answers run on."
            )
            found.append(ParityFault("end", words))
    if all(row["text"] is not None for row in heard["rows"]):
        found += _weights_fault(kind, ours, heard["rows"])
    return found


def _prompt_fault(question: HeldOutRow, row: dict[str, Any], bos: str | None) -> ParityFault | None:
    """Why the ids of a prompt are others than the studio's."""
    heard, ids = row["tokens"], question.prompt
    if row["text"] is None:
        return ParityFault("template", f"The file's chat template cannot be rendered: {row['error']}")
    if heard == ids:
        return None
    if heard[1:] == ids:
        return ParityFault("bos", f"The file puts the token {heard[0]} (BOS) before every text, and the studio does not.")
    if heard == ids[1:]:
        return ParityFault("bos", f"The studio puts the token {ids[0]} (BOS) before every text, and the file does not.")
    if heard[1:] == ids[1:]:
        return ParityFault("bos", f"The file begins every text with the token {heard[0]} (BOS), and the studio with {ids[0]}.")
    theirs, text = (t.removeprefix(bos) if bos else t for t in (row["text"], question.text))
    if theirs != text:
        at = _answers.first_difference(theirs, text) or 0
        where = f"from character {at} on: {theirs[at : at + 30]!r} in the file, {text[at : at + 30]!r} in the studio"
        return ParityFault("template", f"The chat template writes another prompt {where}.")
    at = _answers.first_difference(heard, ids) or 0
    differ = f"token {at} of a prompt is {heard[at : at + 1]} in the file and {ids[at : at + 1]} in the studio"
    return ParityFault("tokens", f"The same text becomes other tokens, so the tokenizer's rule or vocabulary differs: {differ}.")


def _weights_fault(kind: str, ours: Reference, rows: Sequence[dict[str, Any]]) -> list[ParityFault]:
    """Why the answers differ more than rounding explains."""
    tuned = compare(ours.logprobs, rows)
    if ours.base is not None:
        base = compare(ours.base, rows)
        if math.isfinite(tuned.kl) and base.kl < 0.5 * tuned.kl and tuned.kl > LIMITS["Q8_0"] / 10:
            words = f"The file answers as the base does (KL {base.kl:.2g} nats) and not as the fine-tuned model (KL {tuned.kl:.2g})"
            return [ParityFault("adapter", f"{words}: the adapter was not applied.")]
    if not math.isfinite(tuned.kl):
        return [ParityFault("weights", "The file computes no numbers for some texts: its weights are damaged, or too large for its type.")]
    if not tuned.kl > LIMITS[kind]:
        return []
    far_off = kind in EXACT or tuned.kl > FAR_OFF * LIMITS[kind]  # coarse rounding too tells more on longer texts
    if far_off and tuned.first_kl <= max(LIMITS[kind] / 10, 0.02 * tuned.kl):
        words = f"A single token is answered as in the studio (KL {tuned.first_kl:.2g} nats) and longer texts are not (KL {tuned.kl:.2g})"
        return [
            ParityFault("positions", f"{words}: query and key rows are in another order than the rotary embedding, or its base differs.")
        ]
    limit = f"KL {tuned.kl:.2g} nats, and rounding to {kind} explains {LIMITS[kind]:g}"
    if kind in EXACT:
        return [ParityFault("weights", f"The weights of the file are not those of the model: {limit}.")]
    return [ParityFault("weights", f"{kind} is too coarse for this model, or its weights differ: {limit}.")]
