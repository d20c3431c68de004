"""The models that the benchmarks train: shapes by name, drawn at random once, and samples whose lengths are those of instructions."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

LLAMA: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate_size": 128, "vocab_size": 512},
    "14m": {"hidden_size": 256, "layers": 6, "heads": 8, "kv_heads": 4, "intermediate_size": 1024, "vocab_size": 32_000},
    "starter": {"hidden_size": 576, "layers": 30, "heads": 9, "kv_heads": 3, "intermediate_size": 1536, "vocab_size": 49_152},
    "0.5b": {"hidden_size": 896, "layers": 24, "heads": 14, "kv_heads": 2, "intermediate_size": 4864, "vocab_size": 151_936},
    "1b": {"hidden_size": 2048, "layers": 16, "heads": 32, "kv_heads": 8, "intermediate_size": 8192, "vocab_size": 128_256},
    "8b": {
        "hidden_size": 4096,
        "layers": 32,
        "heads": 32,
        "kv_heads": 8,
        "intermediate_size": 14_336,
        "vocab_size": 128_256,
        "tied": False,
    },
}


def config_of(name: str) -> Any:
    from transformers import LlamaConfig

    given = dict(LLAMA[name])
    layers, heads, kv_heads, tied = given.pop("layers"), given.pop("heads"), given.pop("kv_heads"), given.pop("tied", True)
    return LlamaConfig(
        **given,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=65_536,  # more than a step's tokens: Unsloth scales RoPE beyond it, which is another model
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=0,
        pad_token_id=0,
    )


def write_model(name: str, folder: Path, device: str) -> Path:
    """A model of random weights and a tokenizer of as many words, once; in bf16 where it is large."""
    if (folder / "config.json").is_file() and (folder / "done").is_file():
        return folder
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(name)
    torch.manual_seed(7)
    dtype = torch.float32 if name in ("tiny", "14m", "starter") else torch.bfloat16
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(folder)
    write_tokenizer(folder, config.vocab_size)
    (folder / "done").touch()
    return folder


def write_tokenizer(folder: Path, words: int) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    made = Tokenizer(models.WordLevel({f"w{i}": i for i in range(words)}, unk_token="w1"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=made, eos_token="w0", pad_token="w0", unk_token="w1").save_pretrained(folder)


def draw_samples(vocabulary: int, count: int, median: float, sigma: float, shortest: int, longest: int, seed: int = 1) -> list[list[int]]:
    """Token ids with log-normal lengths. Each token mostly follows from the one before it, so that there is something to learn."""
    draw = random.Random(seed)
    most = min(vocabulary - 2, 4000)
    after = [2 + draw.randrange(most) for _ in range(most + 2)]
    samples = []
    for _ in range(count):
        length = int(min(longest, max(shortest, median * 2.718281828 ** draw.gauss(0, sigma))))
        ids = [2 + draw.randrange(most)]
        while len(ids) < length:
            ids.append(after[ids[-1]] if draw.random() < 0.7 else 2 + min(most - 1, int(draw.paretovariate(0.7)) - 1))
        samples.append(ids)
    return samples


def write_samples(path: Path, samples: list[list[int]]) -> Path:
    path.write_text(json.dumps(samples))
    return path
