"""QLoRA and 8-bit AdamW as they are, on the CPU backend of bitsandbytes: `python -m tests.gpu.four_bits` prints what was found as JSON.

In a process of its own, because a worker without a GPU hides that package from every library (`worker/modeling/loading.py`).
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

import bitsandbytes  # noqa: F401  # before the worker's modules
import torch

TOKENS = 320  # unlike every width of the model


def saved_by_a_block(folder: Path) -> dict[str, Any]:
    """What AOTAutograd keeps between the passes of compiled blocks, and how often each graph makes a weight dense."""
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.decomposition import select_decomp_table
    from torch.utils._pytree import tree_leaves
    from transformers import AutoModelForCausalLM

    from app.strategies import STRATEGIES
    from benchmarks.gpu_check import CONFIG
    from worker.modeling import fused_layers, packed_attention
    from worker.modeling.fused_lora import fuse
    from worker.modeling.loading import _in_bits
    from worker.scoring import held_out

    half = torch.bfloat16
    model: Any = AutoModelForCausalLM.from_pretrained(
        folder, dtype=half, attn_implementation=packed_attention.NAME, **_in_bits(4, half, "cpu")
    )
    fused_layers.patch_norms_and_mlp(model)
    model = STRATEGIES["qlora"]().attach(model).train()
    fused = fuse(model)
    widths = {CONFIG["hidden_size"], CONFIG["intermediate_size"], 64}
    found: dict[str, Any] = {"fused": fused, "graphs": 0, "weights": [], "bytes": []}

    def forward(graph: Any, inputs: Any) -> Any:
        found["graphs"] += 1
        kept = [
            x
            for node in graph.graph.nodes
            if node.op == "output"
            for x in tree_leaves(node.args)
            if hasattr(x, "meta") and x.op != "placeholder" and isinstance(x.meta.get("val"), torch.Tensor)
        ]
        shapes = [(x.name, tuple(x.meta["val"].shape)) for x in kept]
        found["weights"] += [f"{name} {shape}" for name, shape in shapes if len(shape) == 2 and set(shape) <= widths]
        found["bytes"].append(sum(x.meta["val"].untyped_storage().nbytes() for x in kept))
        return make_boxed_func(graph.forward)

    backend = aot_autograd(
        fw_compiler=forward, bw_compiler=lambda graph, inputs: make_boxed_func(graph.forward), decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    fused_layers.compile_blocks(model, backend)
    torch._dynamo.config.suppress_errors = False
    ids = torch.randint(0, 4000, (1, TOKENS))
    body = held_out.plain_model(model).get_decoder()
    with torch.autocast("cpu", half):
        hidden = body(input_ids=ids, position_ids=torch.arange(TOKENS)[None], use_cache=False, sequence_lengths=[TOKENS]).last_hidden_state
    hidden.float().sum().backward()
    torch._dynamo.reset()
    return found


def against_lora(folder: Path) -> dict[str, Any]:
    """Losses and gradients of QLoRA, with the layers of peft and with ours, against LoRA's on the same base in float32."""
    from benchmarks.gpu_check import CONFIG, pass_through
    from benchmarks.shapes import draw_samples

    samples = draw_samples(CONFIG["vocab_size"], 6, 60, 0.5, 20, 120)
    plain = pass_through(folder, "cpu", torch.float32, fused=False, samples=samples)
    found = {}
    for name, fused in (("peft", False), ("fused", True)):
        losses, gradient, _, _ = pass_through(folder, "cpu", torch.bfloat16, strategy="qlora", bits=4, fused=fused, samples=samples)
        found[name] = {
            "loss": abs(losses[0] - plain[0][0]) / plain[0][0],
            "cosine": float(torch.nn.functional.cosine_similarity(gradient.double(), plain[1].double(), 0)),
        }
    return found


def in_8_bits() -> dict[str, Any]:
    """How far 8-bit AdamW goes from float32 AdamW in some steps, and whether its state, saved and put back, goes on alike."""
    from worker.training import optim

    def run(kind: str, pause: bool) -> torch.Tensor:
        torch.manual_seed(1)
        named = {"w": torch.nn.Parameter(torch.randn(96, 96))}
        optimizer = optim.make_optimizer(named, 1e-2, 0.0, kind)
        for step in range(6):
            if pause and step == 3:
                kept = optim.state_tensors(optimizer, named)
                optimizer = optim.make_optimizer(named, 1e-2, 0.0, kind)
                optim.load_state(optimizer, named, kept)
            named["w"].grad = torch.randn(96, 96, generator=torch.Generator().manual_seed(step))
            optim.optimizer_step(optimizer, optim.clip_grad_norm(named, 1.0))
        return named["w"].detach()

    plain, ours, again = run("adamw", False), run("adamw_8bit", False), run("adamw_8bit", True)
    return {"apart": float((plain - ours).abs().max()), "same_after_a_pause": torch.equal(ours, again)}


def main() -> None:
    from benchmarks.gpu_check import model_folder

    with tempfile.TemporaryDirectory() as home:
        folder = model_folder("llama", Path(home))
        print(json.dumps({"saved": saved_by_a_block(folder), "lora": against_lora(folder), "adamw": in_8_bits()}))


if __name__ == "__main__":
    main()
