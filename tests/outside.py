"""An OpenAI-compatible server of its own process, as vLLM is one: tokens in, server-sent events out, adapters loaded on demand.

    python -m tests.outside PORT MODEL_FOLDER KEY

Its wire is written here by hand, apart from the studio's, so that the two can disagree.
"""

from __future__ import annotations

import json
import sys
import threading
import uuid
from pathlib import Path
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool

from app.inference.protocol import GenerateRequest, Sampling
from app.kit.manifest import sha256_of
from app.shapes import shape_of
from app.spec import Adapter, ModelRef


def build(folder: Path, key: str) -> FastAPI:
    from worker.inference.engine import Engine
    from worker.inference.model_pool import ModelPool

    app, engine = FastAPI(), Engine(ModelPool())
    shape = shape_of(json.loads((folder / "config.json").read_text()))
    base = ModelRef(id=uuid.uuid4(), name="base", kind="generic", path=str(folder), revision="", shape=shape)
    served: dict[str, ModelRef] = {"served-base": base}
    state: dict[str, Any] = {"active": 0, "loads": 0, "loaded": [], "asked": []}

    @app.middleware("http")
    async def door(request: Request, go: Any) -> Any:
        if request.headers.get("authorization") != f"Bearer {key}":
            return JSONResponse({"error": "Unauthorized"}, 401)
        return await go(request)

    @app.get("/v1/models")
    def models() -> Any:
        return {"object": "list", "data": [{"id": name, "object": "model", "max_model_len": shape.positions} for name in served]}

    @app.get("/state")
    def look() -> Any:
        return state

    @app.post("/v1/load_lora_adapter")
    async def load(request: Request) -> Any:
        said = await request.json()
        if said["lora_name"] in served:
            return JSONResponse({"object": "error", "message": "The lora adapter has already been loaded.", "code": 400}, 400)
        path = Path(said["lora_path"])
        adapter = Adapter(strategy="lora", path=str(path), sha256=sha256_of(path / "adapter_model.safetensors"))
        served[said["lora_name"]] = base.model_copy(update={"adapters": (adapter,)})
        state["loads"] += 1
        state["loaded"].append(said["lora_name"])
        return "Success"

    @app.post("/v1/unload_lora_adapter")
    async def unload(request: Request) -> Any:
        name = (await request.json())["lora_name"]
        if served.pop(name, None) is None:
            return JSONResponse({"error": {"message": f"The lora adapter '{name}' cannot be found.", "code": 404}}, 404)
        state["loaded"].remove(name)
        return "Success"

    @app.post("/v1/completions")
    async def complete(request: Request) -> Any:
        body = await request.json()
        state["asked"].append(body)
        if body["model"] not in served:
            return JSONResponse(
                {"error": {"message": f"The model {body['model']} does not exist.", "type": "NotFoundError", "code": 404}}, 404
            )
        if len(body["prompt"]) + body["max_tokens"] > shape.positions:
            message = f"This model's maximum context length is {shape.positions} tokens."
            return JSONResponse({"error": {"message": message, "type": "BadRequestError", "param": "max_tokens", "code": 400}}, 400)
        if body.get("return_token_ids"):
            adapters = served[body["model"]].adapters
            return await run_in_threadpool(drawn, folder, adapters[0].path if adapters else None, body)
        own = {name: body[name] for name in Sampling.model_fields if name in body and name != "logprobs"}
        sampling = Sampling(**own | {"logprobs": "logprobs" in body, "top_logprobs": body.get("logprobs") or 0})
        asked = GenerateRequest(
            id=uuid.uuid4(),
            owner=uuid.UUID(int=0),
            model=served[body["model"]],
            tokens=body["prompt"],
            sampling=sampling,
            seed=body["seed"],
        )

        def lines() -> Any:
            state["active"] += 1
            try:
                for entries in engine.answer(asked):
                    yield b": still here\n\n"
                    for entry in entries:
                        yield from told(entry)
                yield b"data: [DONE]\n\n"
            finally:
                state["active"] -= 1

        return StreamingResponse(closing(lines()), media_type="text/event-stream")

    async def closing(made: Any) -> Any:
        try:
            async for line in iterate_in_threadpool(made):
                yield line
        finally:
            await run_in_threadpool(made.close)

    return app


_loading = threading.Lock()
"""transformers loads one model at a time: two threads would get each other's weights."""


def drawn(folder: Path, adapter: str | None, body: dict[str, Any]) -> Any:
    """Several answers to one prompt with their tokens, drawn by transformers and peft."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    with _loading:
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        if adapter:
            model = PeftModel.from_pretrained(model, adapter)
    model.eval()
    generator, choices = torch.Generator().manual_seed(body["seed"]), []
    for index in range(body["n"]):
        ids, logs, reason = list(body["prompt"]), [], "length"
        while len(logs) < body["max_tokens"]:
            with torch.no_grad():
                spread = model(input_ids=torch.tensor([ids])).logits[0, -1].log_softmax(0)
            token = int(torch.multinomial(spread.exp(), 1, generator=generator))
            ids.append(token)
            logs.append(float(spread[token]))
            if token in body["stop_token_ids"]:
                reason = "stop"
                break
        tokens = ids[len(body["prompt"]) :]
        about = {"tokens": [str(token) for token in tokens], "token_logprobs": logs, "top_logprobs": None, "text_offset": [0] * len(logs)}
        choices.append({"index": index, "text": "", "token_ids": tokens, "logprobs": about, "finish_reason": reason})
    return {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": body["model"], "choices": choices}


def told(entry: Any) -> Any:
    head = {"id": "cmpl-1", "object": "text_completion", "created": 1, "model": "served"}
    if entry.type == "text":
        logs = None
        if entry.logprobs:
            logs = {
                "text_offset": [0] * len(entry.logprobs), "tokens": [x.token for x in entry.logprobs],
                "token_logprobs": [x.logprob for x in entry.logprobs],
                "top_logprobs": [{x.token: x.logprob} | {t.token: t.logprob for t in x.top} for x in entry.logprobs],
            }  # fmt: skip
        choice = {"index": entry.index, "text": entry.text, "logprobs": logs, "finish_reason": None}
        yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n".encode()
    elif entry.type == "finished":
        choice = {"index": entry.index, "text": "", "logprobs": None, "finish_reason": entry.reason}
        yield f"data: {json.dumps(head | {'choices': [choice]})}\n\n".encode()
    elif entry.type == "done":
        usage = {"prompt_tokens": entry.prompt_tokens, "completion_tokens": entry.completion_tokens}
        usage["total_tokens"] = sum(usage.values())
        yield f"data: {json.dumps(head | {'choices': [], 'usage': usage})}\n\n".encode()


if __name__ == "__main__":
    port, folder, key = sys.argv[1:]
    uvicorn.run(build(Path(folder), key), host="127.0.0.1", port=int(port), log_level="warning")
