"""A LoRA adapter as a GGUF file: A and B of each adapted layer, and the scale as llama.cpp computes it (alpha / rank).

B's rows are in the order of the layer's output, so those of a Llama's queries and keys change places as its weights do.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from app.errors import BadData, Unsupported
from app.export_formats import FORMATS
from app.export_formats.gguf import ARCHITECTURES
from worker import exporters
from worker.exporters._base import ExportedModel, Exporter, ExportOptions, Progress, WrittenFile, completed
from worker.exporters._gguf_types import FILE_TYPES
from worker.exporters.gguf import LAYER, file_name, permuted

KEY = re.compile(r"base_model\.model\.(?:model\.)?layers\.(\d+)\.(.+)\.lora_([AB])\.weight")
PARTS = {name: part for name, part in LAYER.items() if name.startswith(("self_attn.", "mlp.")) and not name.endswith("_norm")}


class GgufAdapterExporter(Exporter):
    format = FORMATS["gguf_adapter"]

    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """One file per type. Raises Unsupported for an adapter that is more than two matrices a layer."""
        written = []
        for place, kind in enumerate(options.types):
            progress(place / len(options.types), f"Writing {kind}")
            path = into / f"{file_name(options.name)}-lora-{kind}.gguf"
            if not path.is_file():
                with completed(path) as part:
                    self._write(source, part, kind, options)
            written.append(WrittenFile(path.name, kind))
        return written

    def run(self, into: Path, one: WrittenFile, work: Path, options: ExportOptions) -> ExportedModel:
        """On a GGUF file of the base, which is written for that and not kept."""
        base = work / "base"
        base.mkdir(exist_ok=True)
        (made,) = exporters.get("gguf").write(
            Path(options.base_folder), base, options.model_copy(update={"types": ("F16",)}), lambda *_: None
        )
        return ExportedModel(base / made.name, into / one.name)

    def _write(self, source: Path, path: Path, kind: str, options: ExportOptions) -> None:
        base = json.loads((Path(options.base_folder) / "config.json").read_text())
        config = json.loads((source / "adapter_config.json").read_text())
        check(config)
        tensors = matrices(source / "adapter_model.safetensors", base)
        writer = gguf.GGUFWriter(path, ARCHITECTURES[base["model_type"]])
        writer.add_type("adapter")
        writer.add_string("adapter.type", "lora")
        writer.add_float32("adapter.lora.alpha", alpha_of(config))
        writer.add_name(options.title or options.name)
        writer.add_file_type(FILE_TYPES[kind].number)
        for name, matrix in tensors.items():
            writer.add_tensor(name, np.ascontiguousarray(matrix, np.float16 if kind == "F16" else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


EXPORTER = GgufAdapterExporter()


def check(config: dict[str, Any]) -> None:
    """Raises Unsupported for what a GGUF adapter has no place for."""
    for field in ("use_dora", "modules_to_save", "rank_pattern", "alpha_pattern", "lora_bias", "trainable_token_indices"):
        if config.get(field):
            raise Unsupported(f"The adapter has {field}, which llama.cpp does not apply.", hint="Export the merged model as GGUF.")
    if config.get("bias", "none") != "none":
        raise Unsupported("The adapter has biases, which llama.cpp does not apply.", hint="Export the merged model as GGUF.")


def alpha_of(config: dict[str, Any]) -> float:
    """What llama.cpp divides by the rank; rank-stabilized LoRA divides by its root (Kalajdzievski 2023)."""
    alpha, rank = float(config["lora_alpha"]), int(config["r"])
    return alpha * math.sqrt(rank) if config.get("use_rslora") else alpha


def matrices(path: Path, base: dict[str, Any]) -> dict[str, np.ndarray]:
    """`blk.N.part.weight.lora_a` (rank, inputs) and `…lora_b` (outputs, rank), float32. Raises Unsupported for any other tensor."""
    from safetensors.torch import load_file

    found = {}
    for name, tensor in load_file(path).items():
        match = KEY.fullmatch(name)
        if match is None or match[2] not in PARTS:
            raise Unsupported(f"llama.cpp applies no adapter to {name[:100]}.", hint="Export the merged model as GGUF.")
        part, matrix = PARTS[match[2]], tensor.float().numpy()
        if match[3] == "B" and part in ("attn_q", "attn_k") and ARCHITECTURES[base["model_type"]] == "llama":
            heads = base["num_attention_heads"]
            matrix = permuted(matrix, heads if part == "attn_q" else base.get("num_key_value_heads") or heads)
        found[f"blk.{match[1]}.{part}.weight.lora_{match[3].lower()}"] = matrix
    if not found:
        raise BadData("The adapter holds no matrices.", hint="Fine-tune again.")
    return dict(sorted(found.items()))
