"""The training benchmark runs, counts what it says it counts, and its engines learn the same."""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from transformers import LlamaConfig, LlamaForCausalLM

from app.settings import PROJECT
from benchmarks import gpu, inductor, training
from benchmarks.engines import WARM, WARM_GPU, Clock, tokenised
from benchmarks.peers import Counting, labels, padded, register_varlen
from benchmarks.shapes import draw_samples
from benchmarks.training import farthest, table
from worker.kernels.gpu.sum_of_products import sum_of_products


@pytest.mark.long
@pytest.mark.timeout(600)  # five processes, on a machine that may be busy
def test_two_engines_on_one_model(tmp_path, monkeypatch, capsys):
    """Through the command that measures a GPU's numbers, here on a processor with a tiny model: what it cannot run it says."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    kernels = Path(os.environ["NUMBA_CACHE_DIR"])  # they need not be compiled once more
    kernels.mkdir(parents=True, exist_ok=True)
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "numba").symlink_to(kernels)
    made, real = [], training.benchmark
    monkeypatch.setattr(training, "benchmark", lambda *given: made.append(real(*given)) or made[-1])
    command = ["--device", "cpu", "--shape", "tiny", "--only", "1.2b_lora,8b_lora_fp8,8b_qlora", "--peers", "hf_trainer", "--rounds", "1"]
    command += ["--steps", "4", "--no-checks", "--limit", "240", "--work", str(tmp_path), "--json", str(tmp_path / "out.json")]
    assert gpu.main(command) == 0
    (report,) = made
    assert report["shape"] == "tiny" and report["strategy"] == "lora" and report["device"] and report["losses_agree"]
    told = report["same_rows_losses"]
    assert len(told["luthier"]) == len(told["hf_trainer"]) == 4 + WARM and report["losses_apart"] < 0.01
    assert [r["engine"] for r in report["results"]] == ["luthier", "hf_trainer"]
    for result in report["results"]:
        assert "error" not in result, result
        assert result["tokens_per_second"] > 0 and result["peak_memory_bytes"] > 10**8 and 5 < result["loss"] < 8
        assert 300 < result["tokens_per_step"] < 700  # near the budget: padding is not counted
    assert "tokens/s" in table(report) and "hf_trainer" in table(report)
    assert not list(tmp_path.rglob("checkpoint-*")), "a checkpoint was written within the timed steps"
    cases = json.loads((tmp_path / "out.json").read_text())["cases"]
    assert cases["1.2b_lora"]["ratio"] == pytest.approx(
        report["results"][0]["tokens_per_second"] / cases["1.2b_lora"]["peers"]["hf_trainer"]
    )
    assert "NVIDIA" in cases["8b_lora_fp8"]["refused"] and cases["8b_qlora"]["refused"]
    last = capsys.readouterr().out.rpartition("goal on one H100")[2]
    assert (
        last.count("1.2b_lora ") == 3
        and "at least 95,000 tokens/s          MISSED" in last
        and last.count("not measured (") == 4
        and "too few rounds" in last
    )


def test_a_goal_is_reached_missed_or_not_measured():
    case = next(case for case in gpu.CASES if case.name == "8b_lora_fp8")
    found = {"tokens_per_second": 18_000.0, "same_rows_losses": [2.0, 1.9]}
    gpu.apart(case, found, {"8b_lora": {"same_rows_losses": [2.0, 2.0]}})
    speed, loss = gpu.lines(case, found)
    assert speed.endswith("reached") and loss.endswith("MISSED") and "5.00% apart" in loss
    assert all("failed: no room" in line for line in gpu.lines(case, {"error": "long story\nno room"}))
    memory = next(case for case in gpu.CASES if case.name == "8b_qlora")
    assert gpu.lines(memory, {"gigabytes": 23.9})[0].endswith("reached") and gpu.lines(memory, {"gigabytes": 24.0})[0].endswith("MISSED")


def test_what_there_is_no_time_for_is_not_run_and_what_was_measured_is_kept(tmp_path, monkeypatch, capsys):
    """As on a machine that is lent for minutes: a call that ends in time, and another that goes on from its file."""
    kept, asked = tmp_path / "out.json", []

    def benchmark(given, work):
        asked.append((given.strategy, given.limit, given.gpu_memory_bytes))
        own = {"engine": "luthier", "tokens_per_second": 10.0, "fraction_of_peak": 0.5, "peak_memory_bytes": 1, "loss": 1.0}
        own |= {"seconds_to_first_step": 1.0, "rounds": [10.0], "details": {}}
        return {"results": [own], "device": "d", "same_rows_losses": {}, "losses_agree": None}

    monkeypatch.setattr(training, "benchmark", benchmark)
    command = ["--only", "1.2b_lora,1.2b_full,8b_qlora", "--no-checks", "--json", str(kept), "--minutes"]
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1e9)
    assert gpu.main([*command, "9"]) == 0 and not asked
    assert capsys.readouterr().out.count("not run (no time was left)") >= 5
    monkeypatch.setattr(gpu, "LEAST_SECONDS", 1.0)
    for expected in (3, 0):  # all in the second call, none in the third
        asked.clear()
        assert gpu.main([*command, "9"]) == 0 and len(asked) == expected
        assert all(500 < limit <= 540 for _, limit, _ in asked)
        assert [memory for name, _, memory in asked if name == "qlora"] == [24 * 2**30][:expected]
    assert json.loads(kept.read_text())["cases"]["1.2b_full"]["tokens_per_second"] == 10.0


def test_padding_is_not_counted():
    counting = Counting(padded)
    batch = counting([{"input_ids": [5, 6, 7], "labels": [5, 6, 7]}, {"input_ids": [8], "labels": [8]}])
    assert counting.tokens == [4]
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["labels"].tolist() == [[5, 6, 7], [8, -100, -100]]


def test_placeholders_are_not_counted():
    counting = Counting(lambda rows: rows, lead=2)
    counting([{"input_ids": [0, 0, 5], "labels": [-100, -100, 5]}])
    counting([{"input_ids": [0, 0, 5, 0, 0, 6, 7], "labels": [-100, -100, 5, -100, -100, 6, 7], "seq_lengths": [3, 4]}])
    assert counting.tokens == [1, 3]


def test_the_first_steps_are_not_timed(monkeypatch):
    clock = Clock(False)
    clock.losses = [1.0] * 6
    clock.marks = [(10.0 * (i < WARM) + i, 2.0 * i) for i in range(6)]
    clock.marks[WARM - 1] = (100.0, 0.0)
    clock.marks[-1] = (103.0, 6.0)
    found = clock.result([10**6] * WARM + [30, 30, 30])
    assert found["tokens_per_second"] == 30.0 and found["tokens_per_cpu_second"] == 15.0


def test_work_that_was_done_before_the_first_time_is_not_counted():
    """On a GPU the event of a step comes when the next one is launched, and is waited for: 20 steps were timed as 19, 5.3 % too fast."""
    assert Clock(True).warm == WARM_GPU > Clock(False).warm == WARM
    found = {}
    for ahead in (0, 1):
        clock = Clock(False, ahead)
        clock.losses, clock.marks = [1.0] * (WARM + 20), [(float(i + ahead), 0.0) for i in range(WARM + 20)]
        clock.marks[-1] = (WARM + 19.0, 0.0)
        found[ahead] = clock.result([100] * (WARM + 20))
    assert found[0]["tokens_per_second"] == found[1]["tokens_per_second"] == 100.0
    assert found[0]["tokens_per_step"] == found[1]["tokens_per_step"] == 100


def test_samples_are_the_same_every_time_and_long_tailed():
    one, two = (draw_samples(512, 200, 75, 0.5, 30, 200) for _ in range(2))
    assert one == two
    lengths = sorted(map(len, one))
    assert 60 < lengths[100] < 95 and lengths[0] >= 30 and lengths[-1] <= 200 and lengths[-1] > 1.8 * lengths[100]


def test_the_table_says_when_losses_differ():
    report = {"device": "d", "shape": "tiny", "strategy": "lora", "tokens": 1, "precision": "bf16", "same_allocator": False, "results": []}
    told = {agree: table({**report, "losses_agree": agree, "losses_apart": 0.02}) for agree in (False, True, None)}
    assert "DIFFER, by 2.00%" in told[False] and "DIFFER" not in told[True] + told[None] and "not compared" in told[None]


def test_a_ratio_is_claimed_by_the_lower_end_of_its_interval():
    """Two rounds that differ by a third prove nothing, however good their median."""
    low, high = training.ratio_interval([130.0, 131.0, 129.0], [100.0, 101.0, 99.0])
    assert 1.27 < low < 1.3 < high < 1.33
    peer = {"engine": "unsloth@32768", "tokens_per_second": 100.0, "rounds": [99.0, 100.0, 101.0]}
    found = gpu.against({"tokens_per_second": 130.0, "rounds": [160.0, 130.0, 100.0]}, peer)
    assert found["ratio"] == 1.3 and found["ratio_low"] < 1.02 and found["best_peer"] == "unsloth@32768"
    goals = next(case for case in gpu.CASES if case.name == "1.2b_lora")
    assert gpu.lines(goals, found)[-1].endswith("MISSED")
    steady = gpu.against({"tokens_per_second": 130.0, "rounds": [131.0, 130.0, 129.0]}, peer)
    assert gpu.lines(goals, steady)[-1].endswith("reached")
    few = gpu.against({"tokens_per_second": 130.0, "rounds": [130.0, 130.0]}, peer)
    assert few["ratio"] == 1.3 and "ratio_low" not in few and gpu.lines(goals, few)[-1].endswith("not measured (too few rounds)")
    assert gpu.against({"tokens_per_second": 1.0, "rounds": [1.0]}, None) == {}


def test_engines_run_in_turn():
    assert training.turns(["a", "b"], 3) == [(0, "a"), (0, "b"), (1, "a"), (1, "b"), (2, "a"), (2, "b")]


def test_a_peer_is_measured_at_each_of_its_sizes_and_the_best_counts(tmp_path, monkeypatch):
    """With a plan, a command line and an interpreter of its own for each; the sum of real tokens per batch stays in proportion."""
    asked, ran = [], []

    def run(command, **given):
        plan = json.loads(Path(command[-1]).read_text())
        ran.append((command[0], plan["engine"], plan["tokens"], plan["batch"], given["timeout"]))
        speed = {"luthier_compiled": 130.0, "trl_tuned": 90.0}.get(plan["engine"], 100.0 + plan["tokens"] / 32_768)
        told = {"tokens_per_second": speed, "peak_memory_bytes": 1, "loss": 1.0, "seconds_to_first_step": 1.0, "losses": [1.0]}
        return subprocess.CompletedProcess(command, 0, "RESULT " + json.dumps(told | {"details": {"attention": "torch_varlen"}}), "")

    def prepare(options, work):
        asked.append(options)
        training.write_samples(work / "samples.json", [[1, 2]])
        config = {
            "model_type": "llama",
            "hidden_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "intermediate_size": 128,
            "vocab_size": 512,
        }
        (work / "config.json").write_text(json.dumps(config))
        plan = {"engines": options.engines.split(","), "device": "cuda", "tokens": options.tokens, "batch": 80, "same_rows": [[0]]}
        rest = {"model": str(work), "shape": "1b", "strategy": "lora", "steps": 4, "precision": "bf16", "rank": 16, "same_allocator": False}
        return plan | rest | {"prompt_share": options.prompt_share}

    monkeypatch.setattr(training, "prepare", prepare)
    monkeypatch.setattr(training.subprocess, "run", run)
    monkeypatch.setattr(training, "device", lambda kind: ("a card", 1e15))
    (tmp_path / "1b").mkdir()
    command = [
        "--only",
        "1.2b_lora",
        "--no-checks",
        "--peers",
        "trl_tuned,unsloth",
        "--python",
        "unsloth=/opt/unsloth/bin/python",
        "--prompt-share",
        "0.35",
    ]
    assert gpu.main([*command, "--work", str(tmp_path), "--json", str(tmp_path / "out.json")]) == 0
    turn = ["luthier_compiled", "trl_tuned", "unsloth", "unsloth", "unsloth"]
    assert [engine for _, engine, *_ in ran] == turn * 3 + ["luthier_compiled", "trl_tuned", "unsloth"]  # and the same rows, once each
    assert [size[2:4] for size in ran[:5]] == [(16_384, 80), (16_384, 80), (8192, 40), (16_384, 80), (32_768, 160)]
    assert {python for python, engine, *_ in ran if engine == "unsloth"} == {"/opt/unsloth/bin/python"}
    assert {python for python, engine, *_ in ran if engine != "unsloth"} == {sys.executable} and asked[0].prompt_share == 0.35
    (found,) = json.loads((tmp_path / "out.json").read_text())["cases"].values()
    assert found["best_peer"] == "unsloth@32768" and found["ratio"] == pytest.approx(130 / 101) and found["ratio_low"] > 1.2
    assert found["peer_details"]["trl_tuned"]["details"] == {"attention": "torch_varlen"}


def test_a_peers_interpreter_needs_nothing_of_ours(tmp_path):
    """What it runs there reads the plan and its samples, and imports neither app nor worker nor what they need."""
    (tmp_path / "samples.json").write_text("[[1, 2, 3]]")
    plan = {"engine": "unsloth", "device": "cuda", "samples": str(tmp_path / "samples.json"), "tokens": 8, "longest": 3}
    (tmp_path / "plan.json").write_text(json.dumps(plan))
    program = (
        "import sys\n"
        "class Blocked:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('app', 'worker', 'pydantic', 'sqlalchemy', 'psutil', 'numpy'):\n"
        "            raise ImportError('OURS ' + name)\n"
        "sys.meta_path.insert(0, Blocked())\n"
        f"sys.argv = ['training', '--child', {str(tmp_path / 'plan.json')!r}]\n"
        "from benchmarks import training\n"
        "training.main()\n"
    )
    done = subprocess.run([sys.executable, "-c", program], cwd=PROJECT, capture_output=True, text=True, check=False)
    assert "No module named 'unsloth'" in done.stderr and "OURS" not in done.stderr, done.stderr


def test_a_prompt_is_learnt_by_nobody():
    train, _ = tokenised([list(range(10, 20)), [1, 2]], [0, 0], 0.35)
    assert train.trained.tolist() == [False] * 5 + [True] * 7 + [False] * 3 + [True]
    assert labels(list(range(10, 20)), 0.35) == [-100] * 3 + list(range(13, 20)) and labels([1, 2], 0.35) == [1, 2]
    assert labels([1, 2], 0.0) == [1, 2] and not tokenised([[1, 2]], [], 0.0)[0].trained[0], "nothing predicts a first token"


def test_the_peak_of_a_card_is_read_off_its_whole_name():
    named = {
        "NVIDIA H100 80GB HBM3": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA H100 NVL": 835e12, "NVIDIA A100-SXM4-80GB": 312e12, "NVIDIA A10": 125e12,
        "NVIDIA A10G": 70e12, "NVIDIA L4": 121e12, "NVIDIA L40S": 362e12, "NVIDIA GeForce RTX 5090": 209e12, "NVIDIA GeForce RTX 3090 Ti": 71e12,
        "Tesla T4": 65e12, "A card of next year": None,
    }  # fmt: skip
    assert {name: training.peak_of(name) for name in named} == named


def test_clocks_and_power_are_those_of_a_busy_gpu(tmp_path, monkeypatch):
    """From what nvidia-smi prints while a run lasts: clock, power, load."""
    tool = tmp_path / "nvidia-smi"
    tool.write_text(
        "#!/bin/sh\nprintf '300, 60.1, 0\\n1900, 600.5, 99\\n1980, 640.5, 98\\n1755, [N/A], 97\\n1830, 620.5, 97\\n'; exec sleep 60\n"
    )
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    with training.clocks(True) as seen:
        time.sleep(0.5)
    assert seen == {"clock_mhz": 1900.0, "power_watts": 620.5}
    with training.clocks(False) as seen:
        pass
    assert seen == {}


def test_curves_are_compared_step_by_step():
    assert farthest({"a": [2.0, 1.0], "b": [2.0, 0.9], "c": []}) == pytest.approx(0.1)
    assert farthest({"a": [2.0], "b": []}) is None


def test_products_of_a_graph_are_counted_with_what_they_read_and_write():
    """A sum in place is two, the second of which reads what it adds to."""
    x, w, a, b = (torch.ones(shape, dtype=torch.bfloat16) for shape in ((8, 16), (16, 4), (8, 2), (2, 4)))
    graph = make_fx(lambda *given: sum_of_products(given[2], given[3], given[0], given[1], None) + given[0] @ given[1])(x, w, a, b)
    out = 8 * 4 * 2
    assert inductor.product_bytes(graph) == [a.nbytes + b.nbytes + out, x.nbytes + w.nbytes + 2 * out, x.nbytes + w.nbytes + out]


def test_a_tuned_peer_computes_each_text_of_a_pack_alone(monkeypatch):
    """The attention that TRL is given, on what its collator says of a pack; the GPU's kernel has a plain one in its place."""
    from torch.nn.attention import varlen

    def plain(q, k, v, ends, ends_k, longest, longest_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):
        assert window_size == (-1, 0) and longest == longest_k == 5 and q.shape[1] == 4 and k.shape[1] == 2
        parts = [[x[a:b].transpose(0, 1)[None] for x in (q, k, v)] for a, b in itertools.pairwise(ends.tolist())]
        given = {"is_causal": True, "scale": scale, "enable_gqa": enable_gqa}
        return torch.cat([torch.nn.functional.scaled_dot_product_attention(*part, **given)[0].transpose(0, 1) for part in parts])

    monkeypatch.setattr(varlen, "varlen_attn", plain)
    widths = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 50,
    }
    torch.manual_seed(1)
    model = LlamaForCausalLM(LlamaConfig(**widths)).eval()
    texts = [torch.arange(3, 8)[None], torch.arange(20, 23)[None]]
    with torch.no_grad():
        alone = torch.cat([model(text).logits[0] for text in texts])
        model.set_attn_implementation(register_varlen())
        ends = torch.tensor([0, 5, 8], dtype=torch.int32)
        more = {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": 5, "max_length_k": 5}
        places = torch.cat([torch.arange(5), torch.arange(3)])[None]
        packed = model(torch.cat(texts, 1), position_ids=places, **more).logits[0]
    torch.testing.assert_close(packed, alone, rtol=1e-4, atol=1e-5)
