"""The code that torch's compiler writes for GPUs that are not here: `python -m benchmarks.inductor`.

    python -m benchmarks.inductor [--targets 80,89,90,100,120] [--shape 1b] [--strategies lora,full] [--tokens 16384] [--json FILE]

A decoder block of the shape is prepared as a long job does it and goes through both passes on a CUDA device that computes nothing
(`tests/gpu/fake.py`), once for each compute capability. Inductor's code for it is kept instead of loaded, and its Triton kernels are
compiled to machine code for that card. No GPU is needed, but g++ and `pip install triton`, which torch's CPU build comes without.

What must hold of every target, and is told by exit status 1 where it does not:

    one graph for each pass, and no break    a block in pieces loses the fusion between them
    no product that adds out of place        its output is copied into first: a LoRA's sums must stay in place
    at most KEPT kernels, products, bytes    what the code of today takes, and a tenth more; a sum in place is two products, and
                                             the bytes of products are what each reads and writes, as if no cache held any
    next to no spilled registers             a kernel that spills is several times slower
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

TARGETS = (80, 89, 90, 100, 120)
"""A100, RTX 4090 and L4, H100, B200, RTX 5090."""
CARDS = {
    # multiprocessors, shared memory of a block in bytes, L2 in MiB, memory in GiB; as the makers state them
    80: (108, 166_912, 40, 80),
    89: (128, 101_376, 72, 24),
    90: (132, 232_448, 50, 80),
    100: (148, 232_448, 126, 180),
    120: (170, 101_376, 96, 32),
}
SPILLED = 32
"""Bytes: a few are spilled where a card has less room, and cost nothing that can be measured."""
LAYERS = 3
"""The lowest has no gradient to pass on and so a graph of its own; the others share one."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", default=",".join(map(str, TARGETS)))
    parser.add_argument("--shape", default="1b")
    parser.add_argument("--strategies", default="lora,full")
    parser.add_argument("--tokens", type=int, default=16_384)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print("RESULT " + json.dumps(written(json.loads(given.child))), flush=True)
        return 0
    rows = []
    print("target  strategy  graphs  breaks  kernels  their GB  products  their GB  added out of place  spilled bytes", flush=True)
    for target in map(int, given.targets.split(",")):
        for strategy in given.strategies.split(","):
            rows.append(_in_a_child({"target": target, "strategy": strategy, "shape": given.shape, "tokens": given.tokens}))
            one = rows[-1]
            print(
                f"sm_{target:<5} {strategy:<9} {one['graphs']:>5}  {one['breaks']:>6}  {one['kernels']:>7}  {one['gigabytes']:>8.2f}"
                f"  {one['products']:>8}  {one['product_gigabytes']:>8.2f}  {one['out_of_place']:>18}  {one['spilled']:>13}",
                flush=True,
            )
    if given.json:
        given.json.write_text(json.dumps(rows, indent=1) + "\n")
    wrong = [f"sm_{one['target']} {one['strategy']}: {fault}" for one in rows for fault in faults(one)]
    print("\n".join(wrong) or "All as it must be.")
    return 1 if wrong else 0


def _in_a_child(case: dict[str, Any]) -> dict[str, Any]:
    """torch must be imported with the device already there, and keeps one target for ever."""
    from tests.gpu.conftest import built

    with tempfile.TemporaryDirectory() as home:
        environment = {
            **os.environ,
            "LUTHIER_DATA_DIR": home,
            "TORCHINDUCTOR_CACHE_DIR": f"{home}/inductor",
            "TRITON_CACHE_DIR": f"{home}/triton",
            "FAKE_CUDA": str(built()),
        }
        command = [sys.executable, "-m", "benchmarks.inductor", "--child", json.dumps(case)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    said = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not said:
        raise SystemExit(f"{case}: {done.stderr[-3000:]}")
    return case | json.loads(said[-1].removeprefix("RESULT "))


KEPT = {"lora": (39, 13.78, 38, 7.72), "full": (28, 6.28, 21, 4.69)}
"""Kernels, their gigabytes, products and theirs, of a middle block, both passes, by strategy, at the shape 1b and 16,384 tokens."""


def faults(one: dict[str, Any]) -> list[str]:
    found = []
    if one["breaks"] or one["graphs"] > 4:
        found.append(f"{one['graphs']} graphs, {one['breaks']} breaks")
    if one["out_of_place"]:
        found.append(f"{one['out_of_place']} products add out of place")
    if one["spilled"] > SPILLED:
        found.append(f"{one['spilled']} bytes of registers are spilled, by {', '.join(one['spillers'])}")
    if one["strategy"] in KEPT and (one["shape"], one["tokens"]) == ("1b", 16_384):
        known = dict(zip(("kernels", "gigabytes", "products", "product_gigabytes"), KEPT[one["strategy"]], strict=True))
        found += [f"{one[what]:.2f} {what} a block; {count} are known" for what, count in known.items() if one[what] > count * 1.1]
    return found


# In the child ---------------------------------------------------------------------------------------------------------


def written(case: dict[str, Any]) -> dict[str, Any]:
    """What the compiler writes for one target: counts over the graphs of a middle block, both passes."""
    from tests.gpu import fake

    target = int(case["target"])
    fake.begin(os.environ["FAKE_CUDA"])
    fake.CARD.update(name=f"sm_{target}", memory=CARDS[target][3] << 30, capability=divmod(target, 10))
    import peft  # noqa: F401  # it and what it imports look for a real GPU
    import torch
    import torch._dynamo.utils

    from worker import train  # noqa: F401

    fake.as_cuda()
    _act_as(target)
    graphs: dict[bool, list[str]] = {False: [], True: []}  # backward: code of each graph
    moved: dict[bool, list[list[int]]] = {False: [], True: []}  # backward: bytes of each product of each graph
    compiler = _compiler(graphs, moved)
    _both_passes(case, compiler)
    breaks = sum(torch._dynamo.utils.counters["graph_break"].values())
    # The lowest block has graphs of its own where its input needs no gradient; they are smaller than those of the others.
    both = [max(made, key=len) for made in graphs.values()]
    code = "\n".join(both)
    products = [count for made in moved.values() for count in max(made, key=len)]
    calls = re.findall(r"^\s+(?:triton_\w+\.run|extern_kernels\.\w+|torch\.ops\.[\w.]+)\(", code, re.MULTILINE)
    spills = _spills(both)
    return {
        "graphs": sum(map(len, graphs.values())),
        "breaks": breaks,
        "kernels": sum("triton_" in call for call in calls),
        "products": len(products),
        "product_gigabytes": sum(products) / 1e9,
        "out_of_place": len(re.findall(r"extern_kernels\.addmm\(", code)),
        "gigabytes": sum(float(one) for one in re.findall(r"'kernel_num_gb': ([\d.]+)", code)),
        "spilled": sum(spills.values()),
        "spillers": sorted(name for name, count in spills.items() if count),
    }


def _act_as(target: int) -> None:
    """Have torch and Triton believe that a card of this compute capability is there."""
    from types import SimpleNamespace

    import torch
    import torch._dynamo.device_interface as interfaces
    from triton.backends.compiler import GPUTarget
    from triton.runtime import driver

    class Driver:
        utils = None
        get_current_target = staticmethod(lambda: GPUTarget("cuda", target, 32))
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device=0: 0)
        get_active_torch_device = staticmethod(lambda: torch.device("cuda", 0))
        get_device_interface = staticmethod(lambda: torch.cuda)
        map_python_to_cpp_type = staticmethod(lambda kind: kind)
        is_active = staticmethod(lambda: True)

    driver.set_active(Driver())
    processors, shared, l2, memory = CARDS[target]
    major, minor = divmod(target, 10)
    properties = SimpleNamespace(
        name=f"sm_{target}", major=major, minor=minor, multi_processor_count=processors, regs_per_multiprocessor=65_536,
        max_threads_per_multi_processor=2048 if target in (80, 90, 100) else 1536, max_threads_per_block=1024, warp_size=32,
        total_memory=memory << 30, shared_memory_per_block_optin=shared, shared_memory_per_block=49_152, L2_cache_size=l2 << 20,
    )  # fmt: skip
    torch.version.cuda = "13.0"
    for name, value in {
        "get_device_properties": lambda device=None: properties,
        "_exchange_device": lambda device: 0,
        "_maybe_exchange_device": lambda device: 0,
        "synchronize": lambda device=None: None,
    }.items():
        setattr(torch.cuda, name, value)
    shown = ("is_available", "current_device", "set_device", "device_count", "get_device_properties", "synchronize", "is_bf16_supported")
    for name in shown:
        setattr(interfaces.CudaInterface, name, staticmethod(getattr(torch.cuda, name)))
    interfaces.CudaInterface.exchange_device = interfaces.CudaInterface.maybe_exchange_device = staticmethod(lambda device: 0)  # type: ignore[assignment]
    interfaces.CudaInterface.get_raw_stream = staticmethod(lambda device=0: 0)  # type: ignore[assignment]


class _Kept(Exception):
    """The code is written and kept; it is not loaded."""


def product_bytes(graph: Any) -> list[int]:
    """What each matrix product of a graph reads and writes."""
    found = []
    for node in graph.graph.nodes:
        name = str(node.target).removesuffix(".default")
        if name in ("aten.mm", "aten.addmm", "aten.bmm", "luthier.sum_of_products"):
            out, read = node.meta["val"].nbytes, [arg.meta["val"].nbytes for arg in node.args if hasattr(arg, "meta")]
            found += [sum(read) + out] if name.startswith("aten.") else [sum(read[:2]) + out, sum(read[2:]) + 2 * out]
    return found


def _compiler(graphs: dict[bool, list[str]], moved: dict[bool, list[list[int]]]) -> Any:
    """A backend that keeps Inductor's code of each graph and the bytes of its products, by whether it is of the backward pass. The graph
    itself goes on with tensors that hold nothing."""
    import copy

    import torch._functorch.config
    import torch._inductor.config
    import torch._inductor.graph
    from functorch.compile import make_boxed_func
    from torch._dynamo.backends.common import aot_autograd
    from torch._functorch.partitioners import min_cut_rematerialization_partition
    from torch._inductor.compile_fx import compile_fx_inner
    from torch._inductor.decomposition import select_decomp_table

    torch._inductor.config.fx_graph_cache = False
    torch._inductor.config.profile_bandwidth = True
    torch._inductor.config.compile_threads = 1
    torch._functorch.config.enable_autograd_cache = False

    def keep(self: Any) -> Any:
        code, _ = self.codegen()
        graphs[self.is_backward].append(code.value if hasattr(code, "value") else str(code))
        raise _Kept

    torch._inductor.graph.GraphLowering.compile_to_module = keep  # type: ignore[method-assign]

    def compiled(graph: Any, inputs: Any, backward: bool) -> Any:
        moved[backward].append(product_bytes(graph))
        try:
            compile_fx_inner(copy.deepcopy(graph), inputs, is_backward=backward)
        except Exception as error:
            cause: BaseException | None = error
            while cause is not None and not isinstance(cause, _Kept):
                cause = cause.__cause__ or cause.__context__
            if cause is None:
                raise
        return make_boxed_func(graph.forward)

    return aot_autograd(
        fw_compiler=lambda graph, inputs: compiled(graph, inputs, False),
        bw_compiler=lambda graph, inputs: compiled(graph, inputs, True),
        decompositions=select_decomp_table,
        partition_fn=min_cut_rematerialization_partition,
    )


def _both_passes(case: dict[str, Any], compiler: Any) -> None:
    """A pack of the shape forwards and backwards, with the model prepared as a long job does it."""
    from types import SimpleNamespace

    import torch
    import torch._dynamo
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import AutoModelForCausalLM

    from app.strategies import STRATEGIES
    from benchmarks.shapes import config_of
    from worker.modeling import fused_layers, packed_attention
    from worker.runtime.device import Compute
    from worker.scoring import held_out

    strategy = STRATEGIES[case["strategy"]](**({"rank": 16, "alpha": 32.0} if case["strategy"] in ("lora", "dora") else {}))
    config = config_of(case["shape"])
    config.num_hidden_layers = LAYERS
    frozen = torch.bfloat16 if strategy.adapter else torch.float32
    engine = Compute(torch.device("cuda", 0), "a card", "bf16", frozen, 1)
    frame = packed_attention.frame_of([235] * 2000 + [1024], case["tokens"])
    with FakeTensorMode(allow_non_fake_inputs=True):
        with torch.device("cuda"):
            model = AutoModelForCausalLM.from_config(config, attn_implementation=packed_attention.NAME, dtype=frozen)
        model.tie_weights()
        model = strategy.attach(model.eval()).train()
        fused_layers.round_embeddings(held_out.plain_model(model), engine.compute)
        fused_layers.patch_layers(model, engine.device)
        fused_layers.compile_blocks(model, compiler)
        torch._dynamo.config.suppress_errors = False
        ids = torch.zeros(1, frame.tokens, dtype=torch.long, device="cuda")
        ends = torch.zeros(frame.sequences + 1, dtype=torch.int32, device="cuda")
        batch = SimpleNamespace(
            input_ids=ids,
            position_ids=ids,
            arguments={"cu_seq_lens": ends, "longest": frame.longest},
            sources=ids[0, : frame.tokens * 2 // 3],
        )
        held_out.hidden_states(model, batch, engine).float().sum().backward()  # type: ignore[arg-type]


def _spills(graphs: list[str]) -> dict[str, int]:
    """Bytes of registers that each Triton kernel spills, as the assembler says when it makes machine code of it."""
    import torch
    import triton
    from torch._inductor.codecache import PyCodeCache
    from torch._inductor.runtime import triton_helpers, triton_heuristics

    triton_helpers.set_driver_to_gpu = lambda: None
    torch._inductor.config.use_static_triton_launcher = False
    triton_heuristics.CachingAutotuner._make_launchers = lambda self: None  # type: ignore[method-assign]
    torch._C._cuda_getCurrentRawStream = lambda device: 0  # type: ignore[attr-defined]  # the code imports it, and nothing is run
    assembler = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "ptxas-blackwell"  # the newest; it knows older cards too
    found: dict[str, int] = {}
    for code in graphs:
        module = PyCodeCache.load(code)
        for name in re.findall(r"^(triton_\w+) = async_compile", code, re.MULTILINE):
            for result in getattr(module, name).compile_results:
                found[name] = max(found.get(name, 0), _spilled(result.kernel.asm["ptx"], assembler))
    return found


def _spilled(ptx: str, assembler: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx.rstrip("\0"))
        arch = re.search(r"^\.target (sm_\w+)", ptx, re.MULTILINE)
        assert arch is not None
        command = [str(assembler), "-v", f"--gpu-name={arch[1]}", str(source), "-o", f"{folder}/kernel.cubin"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-1000:]
    return sum(int(count) for count in re.findall(r"(\d+) bytes spill stores", done.stdout + done.stderr))


if __name__ == "__main__":
    sys.exit(main())
