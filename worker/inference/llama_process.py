"""One llama.cpp server as a child of a generate worker: `python -m worker.inference.llama_process ORDER PIPE`.

    ORDER   {"base", "file", "type", "adapter"?, "adapter_file"?, "context", "parallel", "threads", "key"}
    PIPE    one line of JSON: {"url"} once it answers, or {"error", "hint"}

It writes the GGUF files of the order where they are not there yet. A process of its own, because llama.cpp ends its process when a file
is not as it expects, and because its memory is given back with it. It listens on the loopback, and answers who knows the key.
"""

from __future__ import annotations

import json
import os
import sys
import threading
from pathlib import Path
from typing import Any

from app.errors import StudioError


def main(arguments: list[str]) -> None:
    order = json.loads(Path(arguments[0]).read_text())
    with os.fdopen(int(arguments[1]), "w") as pipe:
        try:
            server = serve(order)
            said = {"url": server.listening_address}
        except StudioError as error:
            said = {"error": error.message, "hint": error.hint}
        except ImportError:
            said = {"error": "llama.cpp is not installed with this worker.", "hint": 'Install it: `pip install "luthier[export]"`.'}
        except Exception as error:
            said = {"error": f"llama.cpp cannot run it: {type(error).__name__}: {str(error)[:300]}", "hint": "Take the built-in engine."}
        pipe.write(json.dumps(said) + "\n")
    if "url" in said:
        threading.Event().wait()  # it answers until this process is killed


def serve(order: dict[str, Any]) -> Any:
    """A server that answers. Raises StudioError where a file cannot be written, RuntimeError where llama.cpp refuses one."""
    import xllamacpp

    file = written("gguf", Path(order["base"]), Path(order["file"]), order["type"], order["base"])
    lora = order.get("adapter") and written("gguf_adapter", Path(order["adapter"]), Path(order["adapter_file"]), "F32", order["base"])
    params = xllamacpp.CommonParams()
    params.model.path = str(file)
    params.n_ctx, params.n_parallel = order["context"] * order["parallel"], order["parallel"]
    params.warmup, params.verbosity, params.api_keys = False, 0, [order["key"]]
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = order["threads"]
    if lora:
        params.lora_adapters = [xllamacpp.CommonAdapterLoraInfo(str(lora), 1.0)]
    return xllamacpp.Server(params)


def written(kind: str, source: Path, file: Path, type_: str, base: str) -> Path:
    """The GGUF file, written from `source` where it is not there: next to its place, and moved there when it is complete."""
    if file.is_file():
        os.utime(file)
        return file
    from worker import exporters
    from worker.exporters._base import ExportOptions

    work = file.parent / f".{file.name}.{os.getpid()}"
    work.mkdir()
    try:
        options = ExportOptions(name="model", types=(type_,), base_folder=base)
        (made,) = exporters.get(kind).write(source, work, options, lambda *_: None)
        os.replace(work / made.name, file)
    finally:
        for left in work.iterdir():
            left.unlink()
        work.rmdir()
    return file


if __name__ == "__main__":
    main(sys.argv[1:])
