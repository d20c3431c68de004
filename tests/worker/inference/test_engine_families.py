"""Every architecture that may come in is answered by the engine as by transformers, alone and in a crowd.

The windows are far shorter than the prompts, the scores are capped where the family knows that, heads and widths are uneven.
"""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

from app.errors import DoesNotFit
from app.shapes import FORMULAS
from tests.tiny import build_tokenizer
from tests.worker.inference.test_engine import PROMPTS, by_transformers, crowd, ref_of, request, run
from worker.inference.engine import Engine
from worker.inference.model_pool import ModelPool

COMMON = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 4, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True, "bos_token_id": None,
}  # fmt: skip
SLIDING_AND_FULL = ["sliding_attention", "full_attention", "sliding_attention", "full_attention"]
FAMILIES = {
    "llama": {"head_dim": 24, "rope_parameters": {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0,
              "high_freq_factor": 4.0, "original_max_position_embeddings": 64}},
    "mistral": {"sliding_window": 9},
    "qwen2": {"use_sliding_window": True, "sliding_window": 9, "layer_types": SLIDING_AND_FULL},
    "qwen3": {"head_dim": 32, "use_sliding_window": True, "sliding_window": 9, "layer_types": SLIDING_AND_FULL},
    "gemma3_text": {"head_dim": 32, "num_key_value_heads": 1, "query_pre_attn_scalar": 48, "sliding_window": 9,
                    "layer_types": SLIDING_AND_FULL, "final_logit_softcapping": 3.0, "attn_logit_softcapping": 2.0},
}  # fmt: skip


def test_no_family_is_left_out():
    assert set(FAMILIES) == set(FORMULAS) - {"bert", "roberta", "xlm-roberta"}


def write_family(home, name):
    """A small model of this family in the data folder: its path. Weights are wide enough that attention decides what is written."""
    tokenizer = build_tokenizer()
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    config = AutoConfig.for_model(name, **(COMMON | FAMILIES[name] | ends))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for layer, parameter in model.named_parameters():
                if parameter.dim() == 2 and "embed" not in layer:
                    parameter.normal_(std=0.15)
    model.generation_config = GenerationConfig(**ends)
    model.save_pretrained(home / "models" / name)
    tokenizer.save_pretrained(home / "models" / name)
    assert json.loads((home / "models" / name / "config.json").read_text())["model_type"] == name
    return f"models/{name}"


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_greedy_equals_transformers_alone_and_in_a_crowd(data_dir, name):
    home, path = data_dir, write_family(data_dir, name)
    engine = Engine(ModelPool(device="cpu"), chunk=7, lone_chunk=11)
    ref = ref_of(home, path)
    expected = [[by_transformers(home / path, prompt)] for prompt in PROMPTS]
    assert len({e[0] for e in expected}) > 3, "every prompt is answered alike, so the test shows nothing"
    requests = [request(ref, prompt, owner=i) for i, prompt in enumerate(PROMPTS)]
    alone = [run(engine, r)[0] for r in requests]
    assert alone == expected
    assert crowd(engine, requests) == expected
    engine.close()


@pytest.mark.long
@pytest.mark.parametrize("name", sorted(name for name, more in FAMILIES.items() if "sliding_window" in more))
def test_a_window_is_what_decides(data_dir, name):
    """With a wide window the same weights write something else: the test above does see it."""
    folder = data_dir / write_family(data_dir, name)
    before = [by_transformers(folder, prompt) for prompt in PROMPTS]
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"sliding_window": 500}))
    assert [by_transformers(folder, prompt) for prompt in PROMPTS] != before


def test_a_model_that_looks_ahead_is_refused(data_dir):
    """Gemma 3's configuration can let every token see the ones behind it, which no cache of the past can serve."""
    path = write_family(data_dir, "gemma3_text")
    config = json.loads((data_dir / path / "config.json").read_text())
    (data_dir / path / "config.json").write_text(json.dumps(config | {"use_bidirectional_attention": True}))
    with pytest.raises(DoesNotFit, match="both directions"):
        ModelPool(device="cpu").place(ref_of(data_dir, path))
