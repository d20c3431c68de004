"""Exported files run in llama.cpp and are compared with the model they came from; planted faults are each found with their cause."""

from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from app.errors import BadData, Unsupported
from tests.worker.exporters.models import build
from worker import exporters
from worker.conversion.convert import from_gguf
from worker.exporters import _answers, _gguf_tokenizer, _parity, _score
from worker.exporters import gguf as gguf_exporter
from worker.exporters._base import ExportOptions

ROWS: list[dict[str, Any]] = [
    {"messages": [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]}
    for asked, answered in [
        ("What wood is the belly made of?", "The belly is made of spruce, and the back of maple."),
        ("How long  does varnish dry, in 2 days or 12?", "In summer a thin coat dries in two days; in winter it takes a week."),
        ("Why does my violin buzz? élan — 木", "Look for an open seam, a loose fine tuner or a crack in the belly."),
    ]
]


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def ours(folder: Path, base: Path | None = None) -> _parity.Reference:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return _parity.reference(lambda: load(folder), tokenizer, "dialogue", ROWS, (lambda: load(base)) if base else None)


def file_of(folder: Path, into: Path, kind: str = "F16") -> Path:
    into.mkdir(exist_ok=True)
    (made,) = exporters.get("gguf").write(folder, into, ExportOptions(name="t", types=(kind,)), lambda *_: None)
    return into / made.name


def line(folder: Path, into: Path, expected: _parity.Reference, kind: str = "F16") -> dict[str, Any]:
    file = file_of(folder, into, kind)
    return _parity.report(kind, file, expected, _parity.run(file, expected, into))


def causes(found: dict[str, Any]) -> list[str]:
    return [fault["cause"] for fault in found["faults"]]


@pytest.mark.long
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3", "gemma3_text"])
def test_llama_cpp_answers_as_the_studio_does(tmp_path: Path, kind: str):
    folder = build(tmp_path / "m", kind)
    expected = ours(folder)
    for name, limit in (("F16", 1e-4), ("Q8_0", 0.01)):
        found = line(folder, tmp_path / "out", expected, name)
        assert found["faults"] == [] and found["identical"] == found["prompts"] == 3, found
        assert 0 <= found["kl"] < limit and found["top1"] > 0.8, found
        score = found["score"]
        assert score["metric"] == "loss" and score["rows"] == 3 and score["there"] == pytest.approx(score["here"], abs=0.5 * limit**0.5)
        assert found["tokens_per_second"] > 1 and found["bytes"] > 10_000


def test_llama_3s_rotary_embedding_is_the_same_there(tmp_path: Path):
    rope = {
        "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
        "rope_theta": 10_000.0,
    }  # fmt: skip
    folder = build(tmp_path / "m", "llama", rope_parameters=rope)
    assert line(folder, tmp_path / "out", ours(folder))["faults"] == []


@pytest.mark.long
def test_a_gemma_in_the_plain_template_is_asked_as_llama_cpp_asks_it(tmp_path: Path):
    """A base without a template that was tuned on conversations: the begin-of-text token stands before both prompts."""
    from app import chat_templates

    folder = build(tmp_path / "m", "gemma3_text")
    (folder / "chat_template.jinja").write_text(str(chat_templates.source("plain", None, (), True)))
    found = line(folder, tmp_path / "out", ours(folder))
    assert found["faults"] == [] and found["identical"] == 3


LLAMA_3_1 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
    "rope_theta": 500_000.0,
}  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("llama", {}),
        ("llama", {"rope_parameters": LLAMA_3_1, "max_position_embeddings": 131_072}),
        ("qwen2", {}),
        ("qwen3", {}),
        ("gemma3_text", {}),
    ],
    ids=["llama", "llama-3.1", "qwen2", "qwen3", "gemma3_text"],
)
def test_a_file_that_is_imported_again_answers_as_the_model(tmp_path: Path, kind: str, changes: dict[str, Any]):
    """Published weights are of 16 bits, so these are too: nothing else is rounded on the way."""
    folder = build(tmp_path / "m", kind, **changes)
    model = load(folder)
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    model.save_pretrained(folder)
    facts = from_gguf(file_of(folder, tmp_path / "out", "F16"), tmp_path / "again")
    assert facts["shape"]["model_type"] == kind
    before, after = AutoTokenizer.from_pretrained(folder), AutoTokenizer.from_pretrained(tmp_path / "again")
    ids = before(ROWS[1]["messages"][1]["content"]).input_ids
    assert after(ROWS[1]["messages"][1]["content"]).input_ids == ids
    far = torch.tensor([ids * 6])  # far enough for the stretched frequencies to tell
    with torch.no_grad():
        apart = (model(far).logits - load(tmp_path / "again")(far).logits).abs().max().item()
    assert apart < 1e-3, apart


def test_rotary_factors_of_no_llama_are_refused(tmp_path: Path):
    folder = build(tmp_path / "m", "llama", rope_parameters={**LLAMA_3_1, "high_freq_factor": 16.0}, max_position_embeddings=131_072)
    with pytest.raises(Unsupported, match="factors per frequency"):
        from_gguf(file_of(folder, tmp_path / "out", "F16"), tmp_path / "again")


# Planted faults -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, _parity.Reference]:
    folder = build(tmp_path_factory.mktemp("good") / "m", "llama")
    return folder, ours(folder)


def copy_of(folder: Path, into: Path) -> Path:
    return Path(shutil.copytree(folder, into))


def test_a_wrong_template_is_found(good, tmp_path: Path):
    folder, expected = good
    other = copy_of(folder, tmp_path / "m")
    template = other / "chat_template.jinja"
    template.write_text(template.read_text().replace("'<|im_end|>' + '\n'", "'<|im_end|>'"))
    found = line(other, tmp_path / "out", expected)
    assert causes(found) == ["template"] and found["identical"] == 0
    assert "writes another prompt from character" in found["faults"][0]["message"]


@pytest.mark.long
def test_a_missing_end_token_is_found(good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Under a name that llama.cpp does not know by itself as an end."""
    folder, _ = good
    other = copy_of(folder, tmp_path / "m")
    for path in (other / "tokenizer.json", other / "tokenizer_config.json", other / "chat_template.jinja"):
        path.write_text(path.read_text().replace("<|im_end|>", "<|done|>"))
    expected = ours(other)
    assert causes(line(other, tmp_path / "right", expected)) == []
    read = _gguf_tokenizer.read

    def without_end(*given: Any) -> _gguf_tokenizer.Vocabulary:
        made = read(*given)
        return made._replace(ids={name: i for name, i in made.ids.items() if name not in ("eos", "eot")} | {"eos": 0})

    monkeypatch.setattr(_gguf_tokenizer, "read", without_end)
    found = line(other, tmp_path / "out", expected)
    assert causes(found) == ["end"] and "<|done|> (id 2) ends an answer in the studio" in found["faults"][0]["message"]


def test_swapped_rotary_rows_are_found(good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, expected = good
    monkeypatch.setattr(gguf_exporter, "permuted", lambda weights, heads: weights)
    found = line(folder, tmp_path / "out", expected)
    assert causes(found) == ["positions"] and found["identical"] == 3
    assert "query and key rows are in another order" in found["faults"][0]["message"]


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "kl", "cause"), [("Q4_K_M", 0.29, "weights"), ("Q4_K_M", 1.3, "positions"), ("Q4_K_M", 0.2, None), ("F16", 0.29, "positions")]
)
def test_coarse_rounding_is_not_taken_for_swapped_rows(monkeypatch: pytest.MonkeyPatch, kind: str, kl: float, cause: str | None):
    """Both tell more on longer texts than on a single token: the figures of a Gemma 3 of 270 M in Q4_K_M."""
    monkeypatch.setattr(_parity, "compare", lambda *_: _parity.Divergence(kl, 0.0055, 0.67))
    found = _parity._weights_fault(kind, SimpleNamespace(base=None, logprobs=[]), [])  # type: ignore[arg-type]
    assert [fault.cause for fault in found] == ([cause] if cause else [])


def test_an_adapter_that_was_not_applied_is_found(good, tmp_path: Path):
    base, _ = good
    tuned = copy_of(base, tmp_path / "tuned")
    model = load(tuned)
    with torch.no_grad():
        for layer in model.model.layers:
            weight = layer.self_attn.v_proj.weight
            torch.manual_seed(3)
            weight += weight.std() * torch.randn(weight.shape[0], 2) @ torch.randn(2, weight.shape[1])
    model.save_pretrained(tuned)
    expected = ours(tuned, base)
    assert causes(line(tuned, tmp_path / "right", expected)) == []
    for kind in ("F16", "Q4_0"):
        found = line(base, tmp_path / "out", expected, kind)
        assert causes(found) == ["adapter"] and "the adapter was not applied" in found["faults"][0]["message"]


@pytest.mark.long
def test_a_wrong_bos_is_found(good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, expected = good
    read = _gguf_tokenizer.read
    for changes, words in (({"ids": {"bos": 0, "eos": 2}, "add_bos": True}, "The file puts the token 0 (BOS) before every text"),):
        monkeypatch.setattr(_gguf_tokenizer, "read", lambda *given, changes=changes: read(*given)._replace(**changes))
        found = line(folder, tmp_path / "out", expected)
        assert causes(found) == ["bos"] and words in found["faults"][0]["message"]
    gemma = build(tmp_path / "g", "gemma3_text")
    expected = ours(gemma)
    monkeypatch.setattr(_gguf_tokenizer, "read", lambda *given: read(*given)._replace(add_bos=False))
    template = gemma / "chat_template.jinja"
    template.write_text(template.read_text().replace("{{ bos_token }}", ""))
    found = line(gemma, tmp_path / "go", expected)
    assert causes(found) == ["bos"] and "The studio puts the token 2 (BOS) before every text" in found["faults"][0]["message"]


def test_another_vocabulary_is_found(good, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder, expected = good
    read = _gguf_tokenizer.read
    monkeypatch.setattr(_gguf_tokenizer, "read", lambda *given: read(*given)._replace(merges=read(*given).merges[:20]))
    assert causes(line(folder, tmp_path / "out", expected)) == ["tokens"]


def test_other_weights_are_found(good, tmp_path: Path):
    folder, expected = good
    other = copy_of(folder, tmp_path / "m")
    model = load(other)
    with torch.no_grad():
        model.lm_head.weight *= 1.3
    model.save_pretrained(other)
    assert causes(line(other, tmp_path / "out", expected)) == ["weights"]


def test_a_file_that_does_not_load_is_said_to_be_so(good, tmp_path: Path):
    folder, expected = good
    file = file_of(folder, tmp_path / "out")
    with file.open("r+b") as opened:
        opened.truncate(file.stat().st_size // 2)
    with pytest.raises(BadData, match=r"llama\.cpp cannot run t-F16\.gguf"):
        _parity.run(file, expected, tmp_path)


# Arithmetic -----------------------------------------------------------------------------------------------------------


def test_divergence_counts_what_is_not_listed_as_one():
    logp = np.log(np.array([0.5, 0.2, 0.2, 0.1]))
    assert _parity.divergence(logp, [(i, float(q)) for i, q in enumerate(logp)]) == pytest.approx(0)
    two = [(0, float(np.log(0.25))), (1, float(np.log(0.25)))]
    assert _parity.divergence(logp, two) == pytest.approx(0.5 * np.log(2) + 0.2 * np.log(0.8) + 0.3 * np.log(0.6))


def test_what_is_no_number_is_no_agreement():
    """llama.cpp writes null for the logarithm of what is no probability."""
    logp = np.log(np.array([0.5, 0.2, 0.2, 0.1], np.float32))
    question = _parity.HeldOutRow("a", "a", [0], [0, 1, 2], [2])
    broken = {"text": "a", "tokens": [0], "probes": [[[0, -0.7]], [[0, None], [1, None]]]}
    assert _parity.divergence(logp, broken["probes"][1]) == np.inf
    expected = _parity.Reference([question], [np.stack([logp, logp])], None, {}, None)
    heard = {"rows": [broken], "ends": {}}
    (fault,) = _parity.faults("F16", expected, heard)
    assert fault.cause == "weights" and "computes no numbers" in fault.message
    assert _parity.compare(expected.logprobs, [broken]).kl == np.inf
    task = _score.Task([_score.Scored([0, 1], [1])], [], [])
    assert _score.compared(task, _score.TaskScores([[1.0]], []), _score.TaskScores([[None]], [])) is None
    assert _parity.smallest([{"type": "F16", "bytes": 1, "faults": [], "score": None}]) is None


def test_the_smallest_that_keeps_the_score():
    task = _score.Task([_score.Scored([0, 1], [1])] * 4, [], [])
    here = _score.TaskScores([[2.0], [1.0], [3.0], [2.0]], [])

    def one(name: str, size: int, changes: list[float], faults: tuple[str, ...] = ()) -> dict[str, Any]:
        there = _score.TaskScores([[row[0] + change] for row, change in zip(here.losses, changes, strict=True)], [])
        return {"type": name, "bytes": size, "faults": list(faults), "score": _score.compared(task, here, there)}

    lines = [
        one("F16", 100, [0.0, 0.0, 0.0, 0.0]),
        one("Q8_0", 50, [0.011, 0.009, 0.01, 0.012]),
        one("Q4_0", 25, [0.1, 0.12, 0.09, 0.1]),
        one("IQ4_XS", 20, [-0.3, 0.3, -0.2, 0.1]),  # lower by chance: it may be much higher
        one("Q5_K_M", 30, [0.0, 0.0, 0.0, 0.0], ("x",)),
    ]
    assert [line["score"]["kept"] for line in lines] == [True, True, False, False, True]
    assert _parity.smallest(lines) == "Q8_0" and _parity.smallest(lines[2:]) is None
    assert lines[1]["score"] | {"interval": None} == {
        "metric": "loss", "rows": 4, "here": 2.0, "there": pytest.approx(2.0105), "interval": None, "kept": True,
    }  # fmt: skip


def test_the_score_of_a_few_labels_is_accuracy():
    task = _score.Task([], [_answers.GreedyPrompt("", [1])] * 6, ["a", "b", "a", "b", "a", "b"])
    here = _score.TaskScores([], ["a", " b", "a", "b", "a", "a"])
    worse = _score.compared(task, here, _score.TaskScores([], ["b", "a", "b", "a", "b", "a"]))
    same = _score.compared(task, here, here)
    assert same["metric"] == "accuracy" and same["here"] == same["there"] == pytest.approx(5 / 6) and same["kept"]
    assert worse["there"] == 0 and worse["interval"][1] < 0 and not worse["kept"]


def test_rows_with_a_few_labels_are_asked_for_them(good):
    tokenizer = AutoTokenizer.from_pretrained(good[0])
    rows = [{"prompt": f"Is {n} even?", "completion": "no" if n % 2 else "yes"} for n in range(12)]
    task = _score.task(tokenizer, "dialogue", rows, 100)
    assert task.rows == [] and len(task.prompts) == 12 and task.labels[:2] == ["yes", "no"]
    texts = _score.task(tokenizer, "dialogue", ROWS, 100)
    assert texts.labels == [] and len(texts.rows) == 3 and all(len(row.places) == _score.PLACES for row in texts.rows)


# Whole answers --------------------------------------------------------------------------------------------------------


def test_greedy_answers_are_those_of_generate(good):
    """In one batch with prompts of other lengths, against transformers one by one."""
    folder, expected = good
    model, tokenizer = load(folder), AutoTokenizer.from_pretrained(folder)
    assert len({len(one.ids) for one in expected.prompts}) > 1
    for one, said in zip(expected.prompts, expected.answers, strict=True):
        ids = torch.tensor([one.ids])
        made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=_answers.TOKENS, do_sample=False)
        assert said._replace(behind=()) == _answers.answer(tokenizer, made[0, len(one.ids) :].tolist(), expected.ends)
        assert all(near[token] == 0 for near, token in zip(said.behind, said.tokens, strict=False)), "its own are not behind"


@pytest.mark.long
def test_answers_that_part_are_shown_and_the_verdict_says_so(good, tmp_path: Path):
    """A type whose divergence is within what its rounding explains, and whose answers are others."""
    folder, _ = good
    # The answer to the first row holds the token <|endoftext|>, which ends it in llama.cpp and means nothing to this model.
    expected = _parity.reference(lambda: load(folder), AutoTokenizer.from_pretrained(folder), "dialogue", ROWS[1:])
    exact, coarse = (line(folder, tmp_path / "out", expected, kind) for kind in ("F32", "Q4_0"))
    assert exact["verdict"] == "as the model" and exact["same_answers"] == 2, exact
    assert exact["answers"] == [{"parts_at": None, "answer": None, "behind": None}] * 2
    assert coarse["same_answers"] < 2 and coarse["verdict"] != "as the model", coarse
    for one, said in zip(coarse["answers"], expected.answers, strict=True):
        assert one["answer"] is None or (one["answer"] != said.text and 0 <= one["parts_at"] < _answers.TOKENS)


def test_the_verdict_counts_the_answers_that_part():
    same, apart = {"parts_at": None, "answer": None}, {"parts_at": 4, "answer": "x"}
    assert _answers.verdict([same, same]) == "as the model"
    assert _answers.verdict([same, apart, {"parts_at": 9, "answer": "y"}]) == "answers part on 2 of 3 prompts, in the median at token 5"
    one = _answers.GreedyAnswer
    here = [one([1, 2, _answers.END], "a", [{1: 0.0}, {2: 0.0, 5: 0.1}, {_answers.END: 0.0, 3: 0.25}])]
    assert _answers.beside(here, [one([1, 2, 3], "b")]) == [{"parts_at": 2, "answer": "b", "behind": 0.25}]
    assert _answers.beside(here, [one([1, 2], "c")]) == [{"parts_at": 2, "answer": "c", "behind": None}]
    assert _answers.beside(here, here) == [{"parts_at": None, "answer": None, "behind": None}]
    assert _answers.heard({"tokens": [5, 6, 2], "text": "t", "ended": True, "withheld": False}, {2}) == one([5, 6, _answers.END], "t")
    half = _answers.heard({"tokens": [1], "text": "t", "ended": False, "withheld": True}, {2})
    assert _answers.beside([one([1, 2], "t")], [half])[0]["parts_at"] is None, "half a character is not given away"
