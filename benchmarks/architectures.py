"""Which architectures the studio takes, and what it found when it tried them: `python -m benchmarks.architectures`.

    python -m benchmarks.architectures [--only gpt2,phi3,…] [--steps 20] [--no-training] [--kill] [--json FILE]

For every architecture of the installed transformers that makes a language model or an encoder, a random model of some 100,000
parameters is put into the import folder of a whole studio, added through the API and, where it is taken, tuned with LoRA for some
steps: on conversations, or as a classifier. The table holds its
tier, the methods that work, the training loss at the first and the last step, and the reason where it is refused. With `--kill` the same job
is started once more, and its trainer killed (`kill -9`) after the first checkpoint: the table says whether the weights are the same in the
end. What FILE holds already is not tried again.
"""

from __future__ import annotations

import argparse
import json
import signal
import tempfile
import time
import warnings
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

from benchmarks.comparison import sent
from benchmarks.servers import PROJECT, Studio, studio, trainers

SMALL = {
    64: "hidden_size dim emb_dim n_embd d_model embedding_size word_embed_proj_dim lru_width",
    2: "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_key_value_heads n_head_kv num_kv_heads "
    "num_experts_per_tok moe_topk linear_num_key_heads",
    4: "num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts linear_num_value_heads",
    96: "intermediate_size hidden_dim ffn_dim d_ff n_inner ffn_hidden_size decoder_ffn_dim encoder_ffn_dim",
    32: "moe_intermediate_size shared_expert_intermediate_size attention_window_size",
    16: "head_dim kv_lora_rank qk_nope_head_dim v_head_dim state_size ssm_state_size mamba_d_state mamba_d_head linear_key_head_dim "
    "linear_value_head_dim sliding_window hidden_size_per_layer_input",
    8: "qk_rope_head_dim rotary_dim mamba_n_heads time_step_rank",
    1: "n_shared_experts n_group topk_group mamba_n_groups n_groups",
    128: "max_position_embeddings n_positions n_ctx max_seq_len block_size",
    512: "vocab_size vocab_size_per_layer_input",
}
"""Values of the keys that a small model of any architecture has."""
_SIZES = {name: value for value, names in SMALL.items() for name in names.split()}
_OPTIONAL = ("num_key_value_heads", "head_dim", "sliding_window", "q_lora_rank")
"""Keys that are left out where the architecture's own default is none."""
OWN: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "dots3_note_text": {"num_key_value_heads": 4},
    "ernie4_5_moe": {"moe_k": 2},
    "esmc": {"num_key_value_heads": 4},
    "falcon_h1": {"mamba_d_ssm": 128},
    "gemma3n_text": {"num_kv_shared_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention"]},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "kimi_linear": {"num_experts_per_token": 2},
    "lfm2_moe": {"layer_types": ["conv", "full_attention"], "num_dense_layers": 1},
    "longformer": {"attention_window": [32, 32], "max_position_embeddings": 258},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "ministral": {"head_dim": 16},
    "nemotron": {"num_key_value_heads": 2},
    "recurrent_gemma": {"num_hidden_layers": 3},
    "zamba": {"attention_hidden_size": 128, "attention_head_dim": 32, "layers_block_type": ["linear_attention", "hybrid"]},
    "zamba2": {"attention_hidden_size": 128, "attention_head_dim": 32, "layers_block_type": ["linear_attention", "hybrid"]},
    "zaya": {"num_experts_per_tok": 1},
}
"""What the others do not have: sizes that must fit each other, and which layers attend."""
SECONDS = 20
"""For making a config and a model: some architectures build large tables."""
SAMPLE, LABELED = PROJECT / "samples" / "plain-explanations.jsonl", PROJECT / "samples" / "shop-questions.csv"


def kinds() -> list[str]:
    """The architectures of the installed transformers that make a language model or an encoder."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WRITERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED
    from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as WITH_ENCODER

    return sorted({*WRITERS, *MASKED, *WITH_ENCODER})


def small_config(kind: str) -> Any:
    """The config of a small model: the sizes it knows are replaced, all else is its own default."""
    from transformers import CONFIG_MAPPING

    made = CONFIG_MAPPING[kind]()
    text = made.get_text_config()
    known = text.to_dict()
    given = {name: size for name, size in _SIZES.items() if name in known and not isinstance(known[name], list | dict)}
    given = {name: size for name, size in given.items() if name not in _OPTIONAL or known[name] is not None}
    if "qk_rope_head_dim" in known:  # its heads are as wide as their parts, and each has keys of its own
        given.pop("head_dim", None)
        given |= {"num_key_value_heads": 4} if "num_key_value_heads" in given else {}
    if len(types := list(dict.fromkeys(known.get("layer_types") or []))) > 1:  # one layer of each kind
        given |= {"layer_types": types, "num_hidden_layers": len(types)}
    given |= OWN.get(text.model_type, {})
    for name, value in {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "cls_token_id": 1, "sep_token_id": 2}.items():
        if isinstance(known.get(name), int):
            given[name] = value
    small = type(text)(**given)
    if small.is_encoder_decoder and getattr(small, "decoder_start_token_id", None) not in range(_SIZES["vocab_size"]):
        small.decoder_start_token_id = small.pad_token_id
    return small


def small_model(kind: str, dtype: Any = None) -> Any:
    """A random small model: with its output layer, or an encoder without one."""
    from worker.conversion.trial import is_encoder
    from worker.modeling.auto import maker_for

    config = small_config(kind)
    encoder = is_encoder(config.to_dict()) and not config.is_encoder_decoder
    return maker_for(config, encoder=encoder).from_config(config, dtype=dtype)


def write_small(kind: str, folder: Path) -> int:
    """A random small model with the tests' tokenizer in `folder`; its number of parameters. Raises what transformers raises."""
    import torch

    from tests.tiny import build_tokenizer

    tokenizer = build_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = small_model(kind, torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(weight.numel() for weight in model.parameters())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="architectures, with commas between them")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--no-training", action="store_true", help="add them only")
    parser.add_argument("--kill", action="store_true", help="kill the trainer of a second job, and compare the weights")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    found = json.loads(given.json.read_text()) if given.json and given.json.is_file() else []
    names = [name for name in (given.only.split(",") if given.only else kinds()) if name not in {one["kind"] for one in found}]
    with tempfile.TemporaryDirectory() as home:
        start = Path(home) / "start"
        write_small("llama", start)
        with studio(start, "smollm2-135m-instruct") as here:
            for kind in names:
                found.append(tried(here, kind, 0 if given.no_training else given.steps, given.kill))
                print(as_line(found[-1]), flush=True)
                if given.json:
                    given.json.write_text(json.dumps(found, indent=1) + "\n")
    print(as_text(found))


def tried(here: Studio, kind: str, steps: int, kill: bool = False) -> dict[str, Any]:
    """One architecture, from its folder to a tuned model."""
    from openai import OpenAI

    folder = here.folder / "import" / kind
    folder.mkdir(parents=True)
    try:
        with _limit(SECONDS):
            parameters = write_small(kind, folder)
    except Exception as error:
        return {"kind": kind, "made": False, "reason": f"{type(error).__name__}: {str(error)[:160]}"}
    began = time.monotonic()
    with OpenAI(base_url=f"{here.url}/v1", api_key=here.key) as client:
        try:
            model: Any = client.post("/models", body={"folder": kind, "name": f"small-{kind}"}, cast_to=object)
            while model["status"] == "fetching":
                time.sleep(0.3)
                model = client.get(f"/models/{model['id']}", cast_to=object)
        except Exception as error:
            return {"kind": kind, "made": True, "tier": None, "reason": str(error)[:300]}
        told = {"kind": kind, "made": True, "parameters": parameters, "seconds": round(time.monotonic() - began, 1)}
        if model["status"] != "ready":
            return told | {"tier": None, "reason": model["error"]["message"]}
        certificate = model["certificate"]
        told |= {"tier": certificate["tier"], "checks": certificate["checks"], "strategies": certificate["strategies"], "reason": ""}
        return told | (_trained(client, model, steps, str(here.folder) if kill else "") if steps else {})


def _trained(client: Any, model: dict[str, Any], steps: int, kill_in: str) -> dict[str, Any]:
    """`kill_in` is the folder of the studio whose trainer is killed."""
    run = {
        "max_steps": steps,
        "save_steps": max(1, steps // 4),
        "epochs": 50,
        "max_tokens_per_step": 512,
        "learning_rate": 5e-3,
        "forgetting": False,
        "samples": 0,
    }
    data = sent(client, LABELED if model["kind"] == "encoder" else SAMPLE, None)
    order = {"model": model["id"], "strategy": {"name": "lora"}, "run": run, "training_file": data}
    try:
        job, _ = _ended(client, order)
        again = _ended(client, order, kill_in) if kill_in and job["status"] == "succeeded" else None
    except Exception as error:
        return {"job": "refused", "why": str(error)[:300]}
    events: Any = client.get(f"/fine_tuning/jobs/{job['id']}/events?limit=100", cast_to=object)
    losses = [e["data"]["train_loss"] for e in reversed(events["data"]) if e["type"] == "metrics" and "train_loss" in (e["data"] or {})]
    why = (job.get("error") or {}).get("message", "")
    told = {"job": job["status"], "why": why, "first": losses[0] if losses else None, "last": losses[-1] if losses else None}
    return told | ({"killed": _same(client, job, *again)} if again else {})


def _ended(client: Any, order: dict[str, Any], kill_in: str = "") -> tuple[Any, bool]:
    """A job that has ended, and whether its trainer was killed (`kill -9`), once, when it had saved a checkpoint."""
    job: Any = client.post("/fine_tuning/jobs", body=order, cast_to=object)
    killed = False
    while job["status"] not in ("succeeded", "failed", "cancelled"):
        waits = bool(kill_in) and not killed
        time.sleep(0.05 if waits else 0.5)
        if waits and client.get(f"/fine_tuning/jobs/{job['id']}/checkpoints", cast_to=object)["data"]:
            for process in trainers(kill_in):
                with suppress(psutil.NoSuchProcess):
                    process.kill()
                    killed = True
        job = client.get(f"/fine_tuning/jobs/{job['id']}", cast_to=object)
    return job, killed


def _same(client: Any, job: Any, again: Any, killed: bool) -> str:
    if not killed:
        return "ended before it was killed"
    if again["status"] != "succeeded":
        return f"killed: {again['status']}, {(again.get('error') or {}).get('message', '')}"
    first, second = (client.get(f"/models/{one['fine_tuned_model']}", cast_to=object)["adapter_sha256"] for one in (job, again))
    return "killed: the same weights" if first == second else "killed: other weights"


class _limit:
    """Raises TimeoutError in the block after so many seconds."""

    def __init__(self, seconds: int) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def late(*_: Any) -> None:
            raise TimeoutError(f"more than {self.seconds} s")

        signal.signal(signal.SIGALRM, late)
        signal.alarm(self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.alarm(0)


def as_line(one: dict[str, Any]) -> str:
    if not one["made"] or one["tier"] is None:
        return f"| {one['kind']} | {'–' if one['made'] else 'not made'} | | | {one['reason'].replace('|', '/')} |"
    works = [name for name, told in one["strategies"].items() if told["works"]]
    methods = f"{len(works)} of {len(one['strategies'])}" if one["strategies"] else "all"
    loss = f"{one['first']:.2f} → {one['last']:.2f}" if one.get("first") is not None else one.get("job", "")
    failed = ", ".join(name for name in one["strategies"] if name not in works)
    more = "; ".join(filter(None, (f"without {failed}" if failed else "", one.get("why", ""), one.get("killed", ""))))
    return f"| {one['kind']} | {one['tier']} | {methods} | {loss} | {more} |"


def as_text(found: list[dict[str, Any]]) -> str:
    """The table in Markdown, and how many are in each tier."""
    counted = Counter("not made" if not one["made"] else one["tier"] or "refused" for one in found)
    lines = ["| architecture | tier | methods | loss | |", "|---|---|---|---|---|", *map(as_line, found)]
    return "\n".join([*lines, "", ", ".join(f"{name}: {count}" for name, count in sorted(counted.items()))])


if __name__ == "__main__":
    main()
