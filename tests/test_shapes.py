"""The arithmetic of a shape against the model itself, for every architecture Luthier tunes."""

from __future__ import annotations

import pytest
import transformers

from app.errors import BadData
from app.shapes import shape_of

COMMON = {
    "vocab_size": 97,
    "hidden_size": 24,
    "intermediate_size": 40,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
CONFIGS = {
    "llama": {**GROUPED, "tie_word_embeddings": False},
    "llama tied, biased": {**GROUPED, "tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True},
    "mistral": {**GROUPED, "head_dim": 8},
    "qwen2": {**GROUPED, "tie_word_embeddings": True},
    "qwen3": {**GROUPED, "head_dim": 8, "tie_word_embeddings": False},
    "gemma3_text": {**GROUPED, "head_dim": 8},
    "gemma2": {**GROUPED, "head_dim": 8},
    "bert": {**COMMON, "type_vocab_size": 2},
}


def build(name: str) -> tuple[transformers.PretrainedConfig, transformers.PreTrainedModel]:
    config = transformers.AutoConfig.for_model(name.split()[0], **CONFIGS[name], pad_token_id=0)
    kind = transformers.AutoModel if name == "bert" else transformers.AutoModelForCausalLM
    return config, kind.from_config(config)


@pytest.mark.parametrize("name", CONFIGS)
def test_counts_equal_the_model(name: str) -> None:
    config, model = build(name)
    shape = shape_of(config.to_dict())
    assert shape.parameters() == sum(p.numel() for p in model.parameters())
    modules = dict(model.named_modules())
    for linear in shape.linears():
        found = [m for path, m in modules.items() if path.endswith("." + linear.name) and ".0." in path]
        found = found if linear.name != "output.dense" else [m for p, m in modules.items() if p.endswith("layer.0.output.dense")]
        assert [(m.in_features, m.out_features, m.bias is not None) for m in found] == [linear[1:]], linear.name
    norms = sum(p.numel() for path, m in modules.items() if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False))
    assert shape.norm_parameters() == norms


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "bert"])
def test_matmul_parameters(name: str) -> None:
    import torch

    config, model = build(name)
    linear = sum(m.weight.numel() for m in model.modules() if isinstance(m, torch.nn.Linear))
    assert shape_of(config.to_dict()).matmul_parameters() == linear


def test_a_missing_key_is_named() -> None:
    with pytest.raises(BadData, match="hidden_size"):
        shape_of({"model_type": "llama", "num_attention_heads": 4})
