"""Compiled blocks, by torch's own count: how many graphs a strategy takes, and that nothing breaks them or has them made again."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
import torch._dynamo.utils
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch.utils._pytree import tree_leaves
from transformers import LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

from app.strategies import STRATEGIES
from benchmarks.gpu_check import data_of
from tests.worker.training.test_step_shapes import BUDGET, CONFIG, CPU, DATA, ENGINE, PLAIN, kernel  # noqa: F401  # a fixture
from worker.data.batching import make_batch
from worker.data.packing import plan
from worker.modeling import fused_layers, packed_attention
from worker.modeling.cross_entropy import head_of, linear_cross_entropy
from worker.scoring import held_out
from worker.training import optim

BREAKS = {"loha with dropout", "lokr with dropout", "dora with dropout"}
"""What is not compiled, because it would be in pieces."""

COMPILE = fused_layers.compile_blocks

NAMES = [name for name, kind in STRATEGIES.items() if kind.recipe == "gradient" and "generation" in kind.tasks and name != "qlora"]
DROPS = [name for name in NAMES if "dropout" in STRATEGIES[name].model_fields]


class Compiled:
    """Some steps over packs of one shape, with the model prepared as a long job does: graphs made until each, and breaks."""

    def __init__(
        self,
        monkeypatch: pytest.MonkeyPatch,
        name: str,
        settings: dict[str, Any] | None = None,
        steps: int = 2,
        backend: Any = None,
        squeezed: bool = False,
    ) -> None:
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        monkeypatch.setattr(fused_layers, "_compiled", False)
        for only_on_a_cpu in ("patch_gated_mlp", "patch_rotary"):
            monkeypatch.setattr(fused_layers, only_on_a_cpu, lambda *_: 0)
        self.counter = backend or CompileCounterWithBackend("eager")
        monkeypatch.setattr(fused_layers, "compile_blocks", lambda model, squeezed: COMPILE(model, self.counter, squeezed))
        torch.manual_seed(2)
        self.strategy = STRATEGIES[name](**(settings or {}))
        config = CONFIG if name != "bitfit" else Qwen2Config(**{k: v for k, v in CONFIG.to_dict().items() if k in WIDTHS})
        kind = LlamaForCausalLM if name != "bitfit" else Qwen2ForCausalLM
        self.model = kind(config).to(torch.bfloat16 if self.strategy.adapter else torch.float32)
        self.model.set_attn_implementation(packed_attention.NAME)
        fused_layers.patch_norms(self.model)
        self.model = self.strategy.attach(self.model).train()
        fused_layers.round_embeddings(held_out.plain_model(self.model), torch.bfloat16)
        self.done = fused_layers.speed_up(self.model, ENGINE, 1e9, squeezed)
        torch._dynamo.config.suppress_errors = False
        self.strategy.begin(self.model, 10)
        self.trained = optim.trained_parameters(self.model)
        self.optimizer = optim.make_optimizer(self.trained, 1e-3, 0.0)
        lead = self.strategy.virtual_tokens()
        rows = [[0] * lead + DATA.ids[DATA.starts[i] : DATA.starts[i + 1]].tolist() for i in range(len(DATA))]
        self.data = data_of(rows) if lead else DATA
        self.frame = packed_attention.frame_of(self.data.lengths, BUDGET)
        self.packs = plan(self.data.lengths, BUDGET, seed=1, epoch=0, most=self.frame.max_sequences())
        self.graphs: list[int] = []
        for at in range(steps):
            self.step(at)

    def step(self, at: int) -> None:
        batch = make_batch(self.data, self.packs[at], CPU, self.frame)
        hidden = held_out.hidden_states(self.model, batch, ENGINE)
        linear_cross_entropy(hidden, head_of(held_out.plain_model(self.model)), batch.targets, torch.bfloat16).backward()
        optim.optimizer_step(self.optimizer, optim.clip_grad_norm(self.trained, 1.0))
        self.optimizer.zero_grad()
        self.graphs.append(self.counter.frame_count)

    @property
    def breaks(self) -> int:
        return sum(torch._dynamo.utils.counters["graph_break"].values())


class Graphs:
    """A backend of torch.compile that counts what is in the graphs of both passes, as Inductor would be given them."""

    def __init__(self) -> None:
        self.frame_count, self.called, self.kept_bytes = 0, Counter[str](), 0
        self.backend = aot_autograd(fw_compiler=self.forward, bw_compiler=self.keep, partition_fn=min_cut_rematerialization_partition)

    def forward(self, graph: Any, inputs: Any) -> Any:
        (out,) = (node for node in graph.graph.nodes if node.op == "output")
        made = {x for x in tree_leaves(out.args) if isinstance(x, torch.fx.Node) and x.op != "placeholder"}
        self.kept_bytes += sum(x.meta["val"].nbytes for x in made if isinstance(x.meta["val"], torch.Tensor))
        return self.keep(graph, inputs)

    def keep(self, graph: Any, inputs: Any) -> Any:
        self.called.update(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
        return make_boxed_func(graph.forward)

    def __call__(self, graph: Any, inputs: Any) -> Any:
        self.frame_count += 1
        return self.backend(graph, inputs)


WIDTHS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "vocab_size", "max_position_embeddings",
    "tie_word_embeddings",
)  # fmt: skip


A_FEW = {"lora", "dora", "full", "ia3", "top_layers", "bottleneck_adapter", "prefix_tuning", "lora with dropout", "pissa with dropout"}
"""What is run by `make test-all`; all others by `make test-faults`."""


@pytest.fixture(autouse=True)
def _settings() -> Any:
    with torch._dynamo.config.patch(suppress_errors=False, recompile_limit=8):
        yield


@pytest.mark.long
@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=() if name in A_FEW else pytest.mark.fault)
        for name in (*NAMES, *(f"{name} with dropout" for name in DROPS))
    ],
)
def test_a_block_is_one_graph_or_two(kernel: None, monkeypatch: pytest.MonkeyPatch, name: str) -> None:  # noqa: F811
    """Two where the lowest block's input needs no gradient. What cannot be compiled whole is not compiled."""
    strategy, _, dropout = name.partition(" ")
    run = Compiled(monkeypatch, strategy, {"dropout": 0.1} if dropout else None)
    assert ("compiled_blocks" in run.done) == (name not in BREAKS)
    assert not run.breaks, dict(torch._dynamo.utils.counters["graph_break"])
    if name in BREAKS:
        assert run.graphs[-1] == 0
    else:
        assert run.graphs[-1] <= 3 and run.graphs[-1] == run.graphs[0], run.graphs


@pytest.mark.long
def test_in_place_sums_stay_in_place_when_compiled(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """What a compiler makes of `addmm_` has an output of its own, into which a GPU first copies what is added to: 13 ms of a step of a 1 B
    model on an H100."""
    graphs = Graphs()
    run = Compiled(monkeypatch, "lora", backend=graphs)
    assert run.done["fused_lora"] and graphs.frame_count in (1, 2)
    assert not graphs.called["aten.addmm.default"], graphs.called
    # Four products a block forwards and backwards, and the lowest block has graphs of its own: its first three need no gradient of x.
    assert graphs.called["luthier.sum_of_products.default"] >= 8


@pytest.mark.long
def test_squeezed_blocks_keep_less_and_repeat_no_product(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """Where memory is short a compiled block computes its cheap parts again, of which the activation of the feed-forward is the largest."""
    found = {}
    for squeezed in (False, True):
        found[squeezed] = graphs = Graphs()
        run = Compiled(monkeypatch, "lora", backend=graphs, squeezed=squeezed)
        assert run.done["activations_squeezed"] is squeezed and not run.breaks
    whole, less = found[False], found[True]
    print(f"kept: {whole.kept_bytes:,} bytes, squeezed {less.kept_bytes:,}")
    assert less.kept_bytes < 0.75 * whole.kept_bytes
    for name in ("aten.mm.default", "luthier.sum_of_products.default", "torch_attn._varlen_attn.default"):
        assert less.called[name] == whole.called[name] > 0, name


@pytest.mark.long
def test_an_evaluation_between_steps_has_nothing_compiled_again(kernel: None, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811
    """A resumed job's first pass is a step, and what an evaluation leaves behind in the layers must not undo its graphs."""
    run = Compiled(monkeypatch, "lora")
    before = run.graphs[-1]
    held_out.validate(run.model, DATA, BUDGET, PLAIN)
    for at in (2, 3):
        run.step(at)
    assert 0 < before == run.graphs[-1], f"compiled again after an evaluation: {run.graphs}"
