"""One of two processes that hold a decoder's rows, whose blocks are compiled as a long job's on GPUs are: losses, graphs and breaks as JSON."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
import torch._dynamo.utils
from torch._dynamo.testing import CompileCounterWithBackend
from transformers import LlamaConfig, LlamaForCausalLM

from worker.modeling import fused_layers
from worker.runtime import distributed
from worker.runtime.device import Compute
from worker.training.backends import fsdp

CPU = torch.device("cpu")
engine = Compute(CPU, "cpu", "fp32", torch.float32, 1)


def losses_of(model: torch.nn.Module, steps: int = 3) -> list[float]:
    found = []
    for step in range(steps):
        ids = (torch.arange(40)[None] * 7 + step) % 96
        loss = model.model(input_ids=ids, use_cache=False).last_hidden_state.square().mean()
        loss.backward()
        found.append(float(loss))
    return found


with distributed.together(CPU, Path(sys.argv[1])) as world:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    plain = copy.deepcopy(model)
    counter = CompileCounterWithBackend("aot_eager")
    fused_layers.compile_blocks(model, counter)
    torch._dynamo.config.suppress_errors = False
    spread = fsdp.Shards(model, engine, world)
    told = {"losses": [losses_of(model), losses_of(plain)]}
    spread.collect()
    told |= {"graphs": counter.frame_count, "breaks": sum(torch._dynamo.utils.counters["graph_break"].values())}
    wanted = {name: p.grad for name, p in plain.named_parameters() if p.grad is not None}
    own = {name: row.grad for name, row in spread.rows.items() if row.grad is not None and row.numel()}
    each = {name: wanted[name].split(-(-len(wanted[name]) // world.size))[world.rank] for name in own if "layers" in name}
    told["apart"] = max(float((own[name] / world.size - part).norm() / part.norm()) for name, part in each.items())
    Path(sys.argv[1], f"told-{world.rank}").write_text(json.dumps(told))
