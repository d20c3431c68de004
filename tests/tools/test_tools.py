"""Programs of others, unchanged, against a studio with a real worker: lm-eval, Inspect, LiteLLM and LangChain. Each is in an environment
of its own below `.tools` (`make test-tools`)."""

from __future__ import annotations

import json
import math
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import PROJECT
from tests.generating import _workers, answering_dir, generate_worker, register_agent, register_tiny  # noqa: F401

HERE = Path(__file__).parent
pytestmark = [pytest.mark.tools, pytest.mark.long, pytest.mark.timeout(300)]


@pytest.fixture
def studio(session, served, api, generate_worker) -> dict[str, str]:  # noqa: F811
    """What the environment of a program says of the studio."""
    register_tiny(session)
    register_agent(session)
    url = f"{served}/v1"
    return {"OPENAI_BASE_URL": url, "OPENAI_API_KEY": api.key, "STUDIO_BASE_URL": url, "STUDIO_API_KEY": api.key}


def run(tool: str, arguments: list[str], studio: dict[str, str], home: Path, cwd: Path = HERE) -> str:
    """What a program of a tool prints. Without the tool the test is skipped."""
    python = PROJECT / ".tools" / tool / "bin" / "python"
    if not python.exists():
        pytest.skip(f"{tool} is not installed (make test-tools)")
    env = {"PATH": os.environ["PATH"], "HOME": str(home), "HF_HOME": str(home / "hf"), "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1"}
    env |= {"LITELLM_LOCAL_MODEL_COST_MAP": "True", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", **studio}
    done = subprocess.run([str(python), *arguments], cwd=cwd, env=env, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 0, (done.stdout + done.stderr)[-6000:]
    return done.stdout


def lm_eval(studio: dict[str, str], home: Path, model: str, task: str, **more: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(results of a task, its samples) as lm-eval writes them."""
    path = "chat/completions" if model == "local-chat-completions" else "completions"
    given = {"model": "tiny", "base_url": f"{studio['OPENAI_BASE_URL']}/{path}", "num_concurrent": "2", "max_retries": "1", **more}
    arguments = ["-m", "lm_eval", "--model", model, "--model_args", ",".join(f"{name}={value}" for name, value in given.items())]
    arguments += ["--tasks", task, "--include_path", ".", "--output_path", str(home / "out"), "--log_samples"]
    arguments += ["--apply_chat_template"] if model == "local-chat-completions" else []
    run("lm-eval", arguments, studio, home, HERE / "lm_eval")
    (results,) = (home / "out").rglob("results_*.json")
    (samples,) = (home / "out").rglob("samples_*.jsonl")
    return json.loads(results.read_text())["results"][task], [json.loads(line) for line in samples.read_text().splitlines()]


@pytest.mark.parametrize("tokens", [True, False])
def test_lm_eval_scores_choices_as_the_model_itself_does(studio, tiny_model, tmp_path, tokens):
    """Log-probabilities of every choice, by token ids and by text, against those that torch computes."""
    more = {"tokenizer": str(tiny_model), "tokenized_requests": str(tokens)}
    results, samples = lm_eval(studio, tmp_path, "local-completions", "violin_choice", **more)
    assert 0 <= results["acc,none"] <= 1 and len(samples) == 4
    for sample in samples:
        choices = sample["doc"]["choices"]
        for choice, (found,) in zip(choices, sample["resps"], strict=True):
            prompt = f"Question: {sample['doc']['question']}\nAnswer:"
            score, greedy = found
            assert float(score) == pytest.approx(log_probability(tiny_model, prompt, f" {choice}"), abs=2e-3)
            assert str(greedy) in ("True", "False")


def log_probability(folder: Path, prompt: str, answer: str) -> float:
    """Sum over the answer's tokens, in nats."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    lead, ids = tokenizer.encode(prompt), tokenizer.encode(prompt + answer)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return math.fsum(float(logs[place - 1, ids[place]]) for place in range(len(lead), len(ids)))


@pytest.mark.parametrize("model", ["local-chat-completions", "local-completions"])
def test_lm_eval_has_answers_written(studio, tiny_model, tmp_path, model):
    more = {} if model == "local-chat-completions" else {"tokenizer": str(tiny_model)}
    results, samples = lm_eval(studio, tmp_path, model, "violin_answer", **more)
    assert 0 <= results["exact_match,none"] <= 1
    assert len(samples) == 4 and all(isinstance(sample["resps"][0][0], str) for sample in samples)
    assert any(sample["resps"][0][0] for sample in samples), [sample["resps"] for sample in samples]


def test_inspect_asks_and_has_a_tool_called(studio, tmp_path):
    plain, calls = json.loads(run("inspect-ai", ["programs/with_inspect.py", str(tmp_path / "logs")], studio, tmp_path).splitlines()[-1])
    assert (plain["status"], calls["status"]) == ("success", "success"), (plain["error"], calls["error"])
    assert len(plain["samples"]) == 2 and plain["tokens"] > 0
    (sample,) = calls["samples"]
    assert "tool" in sample["roles"] and sample["results"] and sample["results"][0] in ("True", "False")


def test_litellm_asks_streams_calls_and_reads_errors(studio, tmp_path):
    found = json.loads(run("litellm", ["programs/with_litellm.py"], studio, tmp_path).splitlines()[-1])
    assert found["whole"] == found["streamed"] and found["usage"][0] == found["usage"][1] > 0
    assert found["finish"] in ("stop", "length") and found["logprobs"] == found["usage"][0]
    assert [name for name, _ in found["call"]] == ["both"] and isinstance(found["call"][0][1]["x"], bool)
    assert found["called"] in ("tool_calls", "stop") and isinstance(found["shaped"]["sure"], bool)
    assert found["text"] and "none" in found["refused"]


def test_langchain_asks_streams_calls_and_reads_a_shape(studio, tmp_path):
    found = json.loads(run("langchain-openai", ["programs/with_langchain.py"], studio, tmp_path).splitlines()[-1])
    assert found["whole"] == found["streamed"] and found["usage"] == found["streamed_usage"] > 0
    assert len(found["several"]) == 2 and found["finish"] in ("stop", "length")
    assert [name for name, _ in found["calls"]] == ["both"], found["called"]
    assert found["results"] and found["answered"] == "ai"
    assert all(isinstance(hard, bool) for hard in found["shaped"].values())
