"""Is every path that only a GPU takes right? Against float32 on the CPU: loss, gradients, no leak, nothing that is not a number.

    python -m benchmarks.gpu_check [--device cuda] [--minutes N]

Prints one line per check and leaves with 1 if any failed. Runs on small models and takes some minutes, most of them compiling; with
--minutes none is begun after that.
"""

from __future__ import annotations

import argparse
import math
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.shapes import draw_samples

TOKENS = 1024
CONFIG = {
    "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 2,
    "vocab_size": 4000, "max_position_embeddings": 2048, "tie_word_embeddings": True, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
}  # fmt: skip


def model_folder(family: str, home: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(3)
    folder = home / family
    if not folder.exists():
        more = {"head_dim": 32} if family == "qwen3" else {}
        AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **CONFIG, **more)).save_pretrained(folder)
    return folder


class Calls:
    """Counts the calls of the fast attention: a layer that quietly took the slow way would give the same figures."""

    def __init__(self) -> None:
        from worker.modeling import packed_attention

        self.count, self._real = 0, packed_attention.varlen_attn
        packed_attention.varlen_attn = self

    def __call__(self, *given: Any, **named: Any) -> Any:
        self.count += 1
        return self._real(*given, **named)

    def close(self) -> None:
        from worker.modeling import packed_attention

        packed_attention.varlen_attn = self._real


def data_of(samples: list[list[int]]) -> Any:
    from worker.data.batching import Tokenised

    starts = np.concatenate([[0], np.cumsum([len(s) for s in samples])]).astype(np.int64)
    trained = np.ones(starts[-1], bool)
    trained[starts[:-1]] = False
    ids = np.concatenate([np.asarray(s, np.int32) for s in samples])
    return Tokenised(ids, trained, starts, list(range(len(samples))), 0, [])


def pass_through(
    folder: Path, device: str, dtype: torch.dtype, *, strategy: str = "lora", fused: bool = True, compiled: bool = False, recompute: int = 0,
    bits: int | None = None, samples: list[list[int]], steps: int = 1,
) -> tuple[list[float], torch.Tensor, torch.Tensor, Any]:  # fmt: skip
    """Losses of some steps, the first step's gradient, the last hidden states, and the model."""
    from transformers import AutoModelForCausalLM

    from app.strategies import STRATEGIES
    from worker.data.batching import make_batch
    from worker.modeling import fused_layers, packed_attention
    from worker.modeling.cross_entropy import head_of, linear_cross_entropy
    from worker.modeling.fused_lora import fuse
    from worker.runtime.device import Compute
    from worker.scoring import held_out
    from worker.training import optim

    where = torch.device(device)
    half = dtype == torch.bfloat16
    chosen = STRATEGIES[strategy]()
    engine = Compute(where, device, "bf16" if half else "fp32", dtype if chosen.adapter else torch.float32, 1)
    more: dict[str, Any] = {}
    if bits:
        from worker.modeling.loading import _in_bits

        more = _in_bits(bits, dtype, device)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=engine.frozen, attn_implementation=packed_attention.NAME, **more)
    model = model if bits else model.to(where)
    fused_layers.patch_norms_and_mlp(model)
    torch.manual_seed(5)
    model = chosen.attach(model).train()
    fused_layers.recompute_layers(held_out.plain_model(model), recompute)
    if engine.framed:
        fused_layers.round_embeddings(held_out.plain_model(model), engine.compute)
    with torch.no_grad():
        draw = torch.Generator().manual_seed(11)
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.data = p.data.float()
                if "lora_" in name:
                    p.copy_(torch.randn(p.shape, generator=draw) * 0.02)
    if fused and hasattr(model, "peft_config"):
        fuse(model, grouped=not (compiled and recompute))
    if compiled:
        fused_layers.compile_blocks(model)
    trained = optim.trained_parameters(model)
    optimizer = optim.make_optimizer(trained, 1e-3, 0.0)
    data = data_of(samples)
    frame = packed_attention.frame_of(data.lengths, TOKENS) if engine.framed else None
    rows = list(range(len(samples)))
    losses, gradient, hidden = [], None, None
    calls = Calls() if engine.framed and not compiled else None  # a compiled block calls the operator itself
    for _ in range(steps):
        batch = make_batch(data, rows, where, frame)
        hidden = held_out.hidden_states(model, batch, engine)
        loss = linear_cross_entropy(hidden, head_of(held_out.plain_model(model)), batch.targets, engine.compute) / batch.trained
        loss.backward()
        if gradient is None:
            gradient = torch.cat([p.grad.float().flatten().cpu() for p in trained.values()])
        norm = optim.clip_grad_norm(trained, 1.0)
        optim.optimizer_step(optimizer, norm)
        optimizer.zero_grad(set_to_none=True)
        losses.append(float(loss))
    if calls:
        calls.close()
        assert calls.count >= steps * CONFIG["num_hidden_layers"], f"only {calls.count} calls of the fast attention"
    assert all(bool(torch.isfinite(p).all()) for p in trained.values()), "a weight is not a number"
    return losses, gradient, hidden.detach().float().cpu(), model


def compare(reference: Any, found: Any, loss_within: float, cosine_above: float) -> str:
    (a, ga, _, _), (b, gb, _, _) = reference, found
    worst = max(abs(x - y) / abs(x) for x, y in zip(a, b, strict=True))
    cosine = float(torch.nn.functional.cosine_similarity(ga.double(), gb.double(), dim=0))
    length = float(gb.norm() / ga.norm())
    assert np.isfinite(b).all(), f"losses {b}"
    assert worst <= loss_within, f"loss differs by {worst:.2e}: {a} {b}"
    assert cosine >= cosine_above, f"gradient cosine {cosine:.6f}"
    assert abs(length - 1) < 0.05, f"gradient length {length:.4f}"
    return f"loss within {worst:.1e}, gradient cosine {cosine:.6f}, length {length:.4f}"


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--minutes", type=float, help="begin no check after so many")
    options = parser.parse_args()
    device, until = options.device, time.monotonic() + 60 * options.minutes if options.minutes else math.inf
    samples = draw_samples(CONFIG["vocab_size"], 9, 80, 0.6, 20, 200)
    failed: list[str] = []

    def check(name: str, body: Callable[[], str]) -> None:
        began = time.perf_counter()
        if time.monotonic() > until:
            print(f"not run {name}", flush=True)
            return
        try:
            said = body()
            print(f"ok      {name}: {said} ({time.perf_counter() - began:.1f} s)", flush=True)
        except Exception as error:
            failed.append(name)
            traceback.print_exc()
            print(f"FAILED  {name}: {type(error).__name__}: {error}", flush=True)

    with tempfile.TemporaryDirectory() as home:
        half = torch.bfloat16
        for family in ("llama", "qwen2", "qwen3"):
            folder = model_folder(family, Path(home))
            reference = pass_through(folder, "cpu", torch.float32, fused=False, samples=samples, steps=4)
            ways: dict[str, dict[str, Any]] = {"peft's layers": {"fused": False}, "fused": {}, "fused, recomputed": {"recompute": 2}}
            ways |= {"fused, compiled": {"compiled": True}, "fused, compiled, recomputed": {"compiled": True, "recompute": 2}}
            for way, given in ways.items():
                if family != "llama" and "recomputed" in way:
                    continue

                def body(folder: Path = folder, given: dict[str, Any] = given, reference: Any = reference) -> str:
                    torch._dynamo.reset()
                    return compare(reference, pass_through(folder, device, half, samples=samples, steps=4, **given), 5e-3, 0.99)

                check(f"{family} lora bf16 {way}", body)
            check(
                f"{family} lora float32",
                lambda folder=folder, r=reference: compare(
                    r, pass_through(folder, device, torch.float32, samples=samples, steps=4), 2e-3, 0.995
                ),
            )
        folder = model_folder("llama", Path(home))
        whole = pass_through(folder, "cpu", torch.float32, strategy="full", samples=samples, steps=4)
        for compiled in (False, True):
            check(
                f"full bf16 compiled={compiled}",
                lambda compiled=compiled: compare(
                    whole, pass_through(folder, device, half, strategy="full", compiled=compiled, samples=samples, steps=4), 1e-2, 0.99
                ),
            )
        for strategy in ("prefix_tuning", "bottleneck_adapter", "dora"):
            check(
                f"{strategy} bf16",
                lambda strategy=strategy: finite(pass_through(folder, device, half, strategy=strategy, samples=samples, steps=3)),
            )
        check("no document sees another", lambda: no_leak(folder, device, samples))
        check("evaluation of a compiled model", lambda: evaluation(folder, device, samples))
        if device == "cuda":
            check("softmax kernel", softmax)
            check("steps as CUDA graphs", lambda: graphs(folder, Path(home)))
            lora = pass_through(folder, "cpu", torch.float32, fused=False, samples=samples, steps=4)
            for fused in (False, True):
                check(
                    f"qlora fused={fused}",
                    lambda fused=fused: compare(
                        lora,
                        pass_through(folder, device, half, strategy="qlora", bits=4, fused=fused, samples=samples, steps=4),
                        5e-2,
                        0.85,
                    ),
                )
    print("all right" if not failed else f"{len(failed)} failed: {failed}")
    return 1 if failed else 0


def finite(found: Any) -> str:
    assert np.isfinite(found[0]).all(), found[0]
    return f"losses {found[0][0]:.4f} to {found[0][-1]:.4f}"


def no_leak(folder: Path, device: str, samples: list[list[int]]) -> str:
    """Changing the first document moves no hidden state of the others."""
    other = [[7] * len(samples[0]), *samples[1:]]
    first = pass_through(folder, device, torch.bfloat16, samples=samples)[2]
    second = pass_through(folder, device, torch.bfloat16, samples=other)[2]
    own = len(samples[0]) - 1
    rest = sum(len(s) - 1 for s in samples)
    moved = float((first[own:rest] - second[own:rest]).abs().max())
    assert moved == 0.0, f"others moved by {moved}"
    assert float((first[:own] - second[:own]).abs().max()) > 0
    return "others moved by 0"


def evaluation(folder: Path, device: str, samples: list[list[int]]) -> str:
    from worker.runtime.device import Compute
    from worker.scoring import held_out

    torch._dynamo.reset()
    _, _, _, model = pass_through(folder, device, torch.bfloat16, samples=samples, compiled=True)
    engine = Compute(torch.device(device), device, "bf16", torch.bfloat16, 1)
    began = time.perf_counter()
    found = held_out.validate(model, data_of(samples), 300, engine)
    assert np.isfinite(found["loss"])
    return f"loss {found['loss']:.4f} in {time.perf_counter() - began:.2f} s"


def graphs(folder: Path, home: Path) -> str:
    """A LoRA job whose passes are captured learns what it learns without, and is no slower."""
    import os

    from app import events
    from app.settings import get_settings
    from worker.train import train

    found = {}
    for mode in ("off", "auto"):
        os.environ |= {"LUTHIER_CUDA_GRAPHS": mode, "LUTHIER_DATA_DIR": str(home / "data")}
        get_settings.cache_clear()
        torch._dynamo.reset()
        spec = text_order(folder, max_steps=60, precision="bf16", max_tokens_per_step=TOKENS)
        said = list(train(spec, get_settings().folder("runs") / mode / "a1"))
        steps = [event for event in said if isinstance(event, events.Step)]
        remarks = [event.message for event in said if isinstance(event, events.Log) and "CUDA graphs" in event.message]
        backend = next(event.details["backend"] for event in said if isinstance(event, events.Started))
        assert not remarks, remarks
        assert backend == ("graphed" if mode == "auto" else "plain"), backend
        found[mode] = [step.loss for step in steps], (steps[-1].seconds - steps[20].seconds) / (len(steps) - 21)
    worst = max(abs(a - b) / abs(a) for a, b in zip(found["off"][0], found["auto"][0], strict=True))
    assert worst < 2e-2, f"losses differ by {worst:.2e}"
    return f"losses within {worst:.1e}, a step {1000 * found['off'][1]:.1f} ms without and {1000 * found['auto'][1]:.1f} ms with"


def text_order(folder: Path, **run: Any) -> Any:
    """A LoRA job on texts of drawn words, for a model that is given a tokenizer of words."""
    import json
    import uuid

    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    from app.datasets.row_store import write_rows
    from app.settings import get_settings
    from app.shapes import shape_of
    from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
    from app.strategies import STRATEGIES

    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(CONFIG["vocab_size"])}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="w0", pad_token="w0").save_pretrained(folder)
    texts = draw_samples(CONFIG["vocab_size"], 9, 80, 0.6, 20, 200)
    path = get_settings().folder("rows", "words") / "rows.parquet"
    digest = write_rows(path, [{"text": " ".join(f"w{token}" for token in text)} for text in texts])
    stored = path.relative_to(get_settings().data_dir).as_posix()
    data = DatasetRef(id=uuid.UUID(int=2), name="words", path=stored, sha256=digest, format="plain_text", rows=len(texts))
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    model = ModelRef(id=uuid.UUID(int=1), name="drawn", kind="generic", path=str(folder), revision="0" * 64, shape=shape)
    quiet = {"epochs": 1000, "samples": 0, "forgetting": False, "row_losses": False, "evaluations_per_epoch": 0, "validation_fraction": 0.0}
    return JobSpec(
        name="graphs",
        task="generation",
        model=model,
        dataset=data,
        run=RunSettings(**quiet | run),
        strategy=STRATEGIES["lora"](dropout=0.0),
    )


def softmax() -> str:
    from worker.kernels.gpu.cross_entropy import softmax_gradient_

    worst = 0.0
    for vocabulary in (4000, 32_000, 128_256, 151_936):
        logits = torch.randn(300, vocabulary, device="cuda", dtype=torch.bfloat16) * 3
        targets = torch.randint(0, vocabulary, (300,), device="cuda")
        targets[::7] = -100
        plain = logits.float().requires_grad_()
        wanted = torch.nn.functional.cross_entropy(plain, targets, reduction="none", ignore_index=-100)
        wanted.sum().backward()
        losses = torch.empty(300, device="cuda")
        softmax_gradient_(logits, targets, losses)
        worst = max(worst, float((losses - wanted).abs().max()), float((logits.float() - plain.grad).abs().max()))
    assert worst < 1e-2, worst
    return f"within {worst:.1e}"


if __name__ == "__main__":
    sys.exit(main())
