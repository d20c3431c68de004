"""The process that plays a machine with a GPU: reads a case a line, runs two steps of the real loop, and says what it saw.

    python -m tests.gpu.child libfakecuda.so

A case and an answer are one line of JSON each. Every case has a data folder of its own, below LUTHIER_DATA_DIR.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import sys
import tempfile
import traceback
import uuid
from pathlib import Path
from typing import Any, NamedTuple

from tests.gpu import fake

STEPS = 2
WIDTHS = {
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 512,
    "max_position_embeddings": 512, "pad_token_id": 0, "eos_token_id": 2, "bos_token_id": None, "tie_word_embeddings": True,
}  # fmt: skip
DECODER = {"num_key_value_heads": 2, "head_dim": 16}
ENCODERS = ("bert", "roberta", "xlm-roberta")


class Enough(Exception):
    """Nothing more is asked of this job."""


def run(case: dict[str, Any]) -> dict[str, Any]:
    """Two steps of a job, or as many as `steps` says: `family`, `strategy`, `precision` and `task`, with the `run` settings and the `shape`
    that it names."""
    from app import events
    from app.machines import hardware
    from app.settings import get_settings
    from worker import train
    from worker.modeling import fused_layers, packed_attention
    from worker.runtime.devices.cuda import Cuda

    kept = dict(fake.CARD)
    fake.CARD.update(case.get("card", {}))
    get_settings().gpu_memory_bytes = case.get("gpu_memory")
    hardware._facts.cache_clear()
    spec = spec_of(case)
    seen: list[dict[str, Any]] = []
    about: dict[str, Any] = {}
    calls: list[tuple[str, ...]] = []
    captured: list[fake.Graph] = []
    real_step, real_attention, real_batch, real_seconds = (
        train.take_step,
        packed_attention.varlen_attn,
        train.next_batch,
        train.seconds_expected,
    )
    compile_blocks = fused_layers.compile_blocks
    if case.get("hours"):  # a job that is worth compiling, which a device that computes nothing does not
        train.seconds_expected = lambda *_: 3600.0 * case["hours"]
        fused_layers.compile_blocks = lambda model, squeezed: len(fused_layers.blocks_of(model))  # type: ignore[assignment,misc]

    def attention(q: Any, k: Any, v: Any, *rest: Any, **named: Any) -> Any:
        calls.append(tuple(str(x.dtype).removeprefix("torch.") for x in (q, k, v)))
        return real_attention(q, k, v, *rest, **named)

    with fake.fake() as watch:

        def take_step(job: Any, batch: Any) -> Any:
            about["longest"], about["frames"] = max(job.lesson.train.lengths), [list(frame) for frame in job.lesson.frames]
            watch.forget()
            calls.clear()
            out = real_step(job, batch)
            seen.append({
                "launches": sum(watch.launched.values()), "operations": dict(watch.launched.most_common()), "waits": dict(watch.waits),
                "on_host": dict(watch.on_host), "attention": len(calls), "types": sorted(set(itertools.chain(*calls))),
                "passes": sum(len(parts) for parts in batch.batches),
                "tokens": batch.batches[0][0].input_ids.shape[1] if hasattr(batch.batches[0][0], "input_ids") else 0,
                "peak": watch.peak, "alive": watch.alive,
                "addresses": addresses(job.backend), "devices": sorted({str(p.device.type) for p in itertools.chain(job.model.parameters(), job.model.buffers())}),
            })  # fmt: skip
            if len(seen) == case.get("steps", STEPS):
                raise Enough
            return out

        def next_batch(job: Any, packs: Any) -> Any:
            watch.forget()
            out = real_batch(job, packs)
            if seen:
                seen[-1]["waits"] |= dict(watch.waits)
            return out

        train.take_step, train.next_batch, packed_attention.varlen_attn = take_step, next_batch, attention
        Cuda.capture = lambda self, run, *, warm=True: fake.Graph(watch, captured, run)  # type: ignore[assignment,method-assign,misc]
        said: dict[str, Any] = {}
        try:
            for event in train.train(spec, Path(os.environ["LUTHIER_DATA_DIR"]) / "runs" / str(uuid.uuid4()) / "a1"):
                if isinstance(event, events.Started):
                    said = {"device": event.device, "precision": event.precision, **event.details}
                    if case.get("steps") == 0:
                        break
        except Enough:
            pass
        finally:
            train.take_step, train.next_batch, packed_attention.varlen_attn = real_step, real_batch, real_attention
            train.seconds_expected, fused_layers.compile_blocks = real_seconds, compile_blocks
            share = fake.CARD.pop("share", None)
            fake.CARD.update(kept)
    return {
        "steps": seen,
        "started": said,
        "layers": spec.model.shape.layers,
        "spec": spec.model_dump(mode="json"),
        "share": share,
        "captured": [{"launches": one.launches, "copied": one.copied} for one in captured],
        **about,
    }


def addresses(backend: Any) -> str:
    """A digest of where everything is that captured passes read and write."""
    held = [p for p in backend.model.parameters()] + [p.grad for p in backend.trained.values() if p.grad is not None]
    for one in getattr(backend, "captured", {}).values():
        held += [one.batch.input_ids, one.batch.position_ids, one.batch.arguments["cu_seq_lens"], one.gradient, one.ahead.out]
    return f"{hash(tuple(x.untyped_storage()._cdata for x in held)):x}"


def spec_of(case: dict[str, Any]) -> Any:
    from transformers import AutoConfig

    from app.datasets.row_store import write_rows
    from app.settings import get_settings
    from app.shapes import shape_of
    from app.spec import DatasetRef, JobSpec, ModelRef, RunSettings
    from app.strategies import STRATEGIES

    family, task = case.get("family", "llama"), case.get("task", "generation")
    root = get_settings().data_dir
    folder = root / "models" / f"{family}-{uuid.uuid4()}"
    encoder = family in ENCODERS
    widths = {**WIDTHS, **({} if encoder else DECODER), **case.get("shape", {})}
    if family == "roberta" or family == "xlm-roberta":
        widths["max_position_embeddings"] += 2
    AutoConfig.for_model(family, **widths).save_pretrained(folder)
    tokenizer().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    kind = "encoder" if encoder else "dialogue"
    model = ModelRef(id=uuid.uuid4(), name="tiny", kind=kind, path=f"models/{folder.name}", revision="0" * 64, shape=shape)
    rows, format_ = rows_of(task, case.get("rows", 96), case.get("words", 0), case.get("long", 0))
    path = get_settings().folder("rows", str(uuid.uuid4())) / "rows.parquet"
    data = DatasetRef(
        id=uuid.uuid4(), name="rows", path=path.relative_to(root).as_posix(), sha256=write_rows(path, rows), format=format_, rows=len(rows)
    )
    given = {
        "epochs": 3, "max_tokens_per_step": 256, "samples": 0, "learning_rate": 1e-3, "forgetting": False, "validation_fraction": 0.0,
        "early_stopping_patience": 0, "precision": case.get("precision", "bf16"), **case.get("run", {}),
    }  # fmt: skip
    strategy = STRATEGIES[case.get("strategy", "lora")](**case.get("settings", {}))
    return JobSpec(name="a test", task=task, model=model, dataset=data, run=RunSettings(**given), strategy=strategy)


def answer(case: dict[str, Any]) -> dict[str, Any]:
    """Some tokens of `answers` answers of the playground, sampled as `sampling` says: what was launched for each token and waited for,
    and how many steps were captured."""
    import torch

    real, torch.inference_mode = torch.inference_mode, torch.no_grad  # type: ignore[misc]  # for decorators: fake tensors cannot be in it
    from app.inference.protocol import GenerateRequest, Sampling
    from worker.inference import model_pool, next_token
    from worker.inference.engine import Engine

    torch.inference_mode = real  # type: ignore[misc]
    from worker.inference.sampling import Sampler
    from worker.runtime.transfer import AsyncScalars

    class Said(NamedTuple):
        likeliest: int = 5

        def sampled(self, sampler: Sampler) -> int:
            return sampler.count(5)

        def logprob(self, *_: Any) -> Any:
            return next_token.say(tokenizer(), 5, -1.0)

    def options(logits: Any, wanted: Any) -> list[Said]:
        parts, *_ = next_token.computed(logits, wanted)
        AsyncScalars(list(parts.values())).read()
        return [Said() for _ in wanted]

    captured: list[fake.Graph] = []
    steps: list[dict[str, Any]] = []
    spec = spec_of(case)
    next_token.options, Sampler.number = options, lambda self: 0.5  # type: ignore[assignment,method-assign]
    model_pool.check = lambda *_, **__: None  # type: ignore[attr-defined]
    with fake.fake() as watch:
        engine = Engine(model_pool.ModelPool(device="cuda"))  # whose own thread is never woken: the steps are taken here
        place = engine.shelf.place(spec.model)
        place.lane.graphs.graph = functools.partial(fake.Graph, watch, captured)  # type: ignore[union-attr]
        for i in range(case["answers"]):
            request = GenerateRequest(
                id=uuid.uuid4(), owner=uuid.UUID(int=i), model=spec.model, prompt="wood " * 9, seed=i,
                sampling=Sampling(**{"max_tokens": 400, **case.get("sampling", {})}),
            )  # fmt: skip
            engine.waiting.append(engine._prepare(request, place, 0.0)[0])
        engine._admit()
        for _ in range(case.get("tokens", 5)):
            watch.forget()
            engine._step_or_break(place.lane)
            steps.append(
                {"launches": sum(watch.launched.values()), "operations": dict(watch.launched.most_common()), "waits": dict(watch.waits)}
            )
        written = [r.written for r in engine.active]
    return {"steps": steps, "captured": len(captured), "written": written}


@functools.cache
def tokenizer() -> Any:
    from tests.tiny import build_tokenizer

    return build_tokenizer()


def rows_of(task: str, count: int, words: int, long: int) -> tuple[list[dict[str, Any]], str]:
    """So many rows, short ones, or with so many words in each answer; the last `long` of them have some hundreds."""
    from tests.worker.orders import chat_rows

    chats = chat_rows(count)
    for place, row in enumerate(chats):
        if many := words or 350 * (place >= count - long):
            row["messages"][1]["content"] = "wood " * many
    if task == "classification":
        return [{"text": row["messages"][0]["content"], "label": f"l{i % 3}"} for i, row in enumerate(chats)], "classification"
    if task == "preference":
        return [
            {"messages": row["messages"][:1], "chosen": row["messages"][1:], "rejected": [{"role": "assistant", "content": f"No {i}."}]}
            for i, row in enumerate(chats)
        ], "preference"
    if task == "kto":
        return [
            {"messages": row["messages"][:1], "answer": row["messages"][1:], "good": i % 2 == 0} for i, row in enumerate(chats)
        ], "rated"
    return chats, "chat"


def main() -> None:
    fake.begin(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    import bitsandbytes  # noqa: F401  # before worker.modeling.loading, which hides it where there is no GPU
    import peft  # noqa: F401
    import torch

    from worker.modeling import auto, classifier, loading
    from worker.training.backends import graphed
    from worker.training.objectives import dpo

    fake.as_cuda()
    graphed.same = graphed.agree = lambda *_: True  # type: ignore[assignment]  # no value is known
    auto.AutoModelForCausalLM = fake.From(auto.AutoModelForCausalLM)  # type: ignore[misc,assignment]
    classifier.AutoModel = fake.From(classifier.AutoModel)  # type: ignore[misc,assignment]
    loading.integrity.check = lambda *_, **__: None  # type: ignore[assignment]  # its weights are an empty file

    def nothing(self: Any, model: Any, data: Any, engine: Any, budget: int) -> Any:
        yield 0.5  # it is read with the base once, before the steps
        return torch.zeros(len(data), 2)

    dpo.DPO._score = nothing  # type: ignore[assignment,method-assign]
    dpo.write_folder = lambda *_, **__: None  # type: ignore[assignment]
    for line in sys.stdin:
        try:
            case = json.loads(line)
            said = answer(case) if "answers" in case else run(case)
        except Exception as error:
            said = {"error": f"{type(error).__name__}: {error}", "trace": traceback.format_exc()}
        answers.write(json.dumps(said) + "\n")


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as home:
        os.environ.setdefault("LUTHIER_DATA_DIR", home)
        main()
