"""The importance matrix of a model: how large the inputs of each matrix are, by column, on rows that it was trained on.

Quantization then spends its precision on the columns that meet large inputs. It is what `llama-imatrix` of llama.cpp measures: the
mean square of every input (https://github.com/ggml-org/llama.cpp/tree/master/tools/imatrix).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROWS = 64
MAX_TOKENS = 512


def measure(
    source: Path, kind: str, rows: Sequence[dict[str, Any]], share: Callable[[float], None] = lambda _: None
) -> dict[str, np.ndarray]:
    """Weight of a linear layer → mean square of its inputs, (inputs,) float32, over the tokens of the rows; empty where no row can be
    rendered. `source` is a folder of merged weights, `kind` the model's."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, local_files_only=True, trust_remote_code=False)
    texts = _texts(tokenizer, kind, rows)
    model = AutoModelForCausalLM.from_pretrained(
        source, dtype=torch.float32, use_safetensors=True, local_files_only=True, trust_remote_code=False
    ).eval()
    sums: dict[str, torch.Tensor] = {}

    def add(name: str) -> Callable[..., None]:
        def hook(_: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            squares = inputs[0].detach().reshape(-1, inputs[0].shape[-1]).float().pow(2).sum(0).double()
            sums[name] = sums[name] + squares if name in sums else squares

        return hook

    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear):
            module.register_forward_pre_hook(add(f"{name}.weight"))
    with torch.inference_mode():
        for done, ids in enumerate(texts, start=1):
            model(torch.tensor([ids]))
            share(done / len(texts))
    tokens = sum(map(len, texts))
    # No column weighs nothing: a block of such would be quantized to anything.
    found = {name: (total / tokens).clamp(min=1e-6 * float(total.mean()) / tokens).float().numpy() for name, total in sums.items()}
    if "lm_head.weight" in found:  # where both are one matrix it is stored as the embedding
        found["model.embed_tokens.weight"] = found["lm_head.weight"]
    return found


def _texts(tokenizer: Any, kind: str, rows: Sequence[dict[str, Any]]) -> list[list[int]]:
    from app.errors import StudioError
    from worker.data.chat_template import render_row

    found = []
    for row in rows[:: max(1, len(rows) // ROWS)][:ROWS]:
        try:
            ids = render_row(tokenizer, row, kind, MAX_TOKENS).ids
        except StudioError:
            continue
        if ids:
            found.append(list(ids))
    return found
