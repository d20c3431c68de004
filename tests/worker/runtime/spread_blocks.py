"""One of two processes that hold a decoder's rows: what one pass in bf16 costs it and gives, as JSON, beside the plain model's."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformers import LlamaConfig, LlamaForCausalLM

from worker.modeling import fused_layers
from worker.runtime import distributed
from worker.runtime.device import Compute
from worker.training.backends import fsdp

IDS = torch.arange(40)[None] * 7 % 96
engine = Compute(torch.device("cpu"), "cpu", "bf16", torch.float32, 1)


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    with torch.autocast("cpu", torch.bfloat16, cache_enabled=False):
        return model.model(input_ids=IDS, use_cache=False).last_hidden_state.float().square().mean() + model.lm_head.weight.square().mean()


with distributed.together(engine.device, Path(sys.argv[1])) as world:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_hidden_layers": 3, "vocab_size": 96}
    model = LlamaForCausalLM(LlamaConfig(**sizes))
    plain = copy.deepcopy(model)
    wanted = loss_of(plain)
    wanted.backward()
    spread = fsdp.Shards(model, engine, world)
    blocks, gathered = fused_layers.blocks_of(model), []
    for block in blocks:
        block.register_forward_pre_hook(
            lambda *_: gathered.append(sum(not isinstance(next(one.parameters()), DTensor) for one in blocks)), prepend=False
        )
    kinds = set()
    blocks[0].self_attn.q_proj.register_forward_pre_hook(lambda layer, _: kinds.add(str(layer.weight.dtype)))
    loss = loss_of(model)
    after = [isinstance(p, DTensor) for p in model.model.layers.parameters()]
    (loss / world.size).backward()
    spread.collect()
    length = float(spread.length())
    told = {
        "losses": [float(loss), float(wanted)],
        "lengths": [length, float(torch.nn.utils.get_total_norm([p.grad for p in plain.parameters() if p.grad is not None]))],
        "gathered": gathered,
        "spread_after": all(after),
        "kinds": sorted(kinds),
        "rows": sorted({str(row.dtype) for row in spread.rows.values()} | {str(row.grad.dtype) for row in spread.rows.values()}),
    }
    Path(sys.argv[1], f"told-{world.rank}").write_text(json.dumps(told))
