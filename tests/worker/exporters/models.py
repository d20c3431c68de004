"""Small models of every architecture that is exported, with weights large enough that a wrong one shows in the answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.tiny import build_tokenizer

SIZES = {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 6, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 512, "initializer_range": 0.12, "bos_token_id": None, "eos_token_id": 2,
    "pad_token_id": 0,
}  # fmt: skip
GEMMA_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] + '<end_of_turn>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)


def build(folder: Path, kind: str, **changes: Any) -> Path:
    """A model of one `model_type`, the same bytes every time, with a tokenizer of its family."""
    import torch
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM, GenerationConfig

    tokenizer = gemma_tokenizer() if kind == "gemma3_text" else build_tokenizer()
    sizes = {**SIZES, "tie_word_embeddings": kind == "gemma3_text", "head_dim": 16}
    if kind == "gemma3_text":
        sizes |= {"vocab_size": len(tokenizer), "query_pre_attn_scalar": 16, "sliding_window": 16, "initializer_range": 0.08}
        sizes |= {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    config = CONFIG_MAPPING[kind](**{**sizes, **changes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = AutoModelForCausalLM.from_config(config).to(torch.float32)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim == 1:  # norms of one and biases of none would hide what is done with them
                    parameter.add_(0.2 * torch.randn_like(parameter))
                elif "embed" in name or "lm_head" in name:
                    parameter.copy_(0.2 * torch.randn_like(parameter))
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def gemma_tokenizer() -> Any:
    """A BPE with byte fallback as Gemma's: ▁ for a space, bytes as <0x41>, a BOS before every text."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    from tests.tiny import SENTENCES

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", "<start_of_turn>", "<end_of_turn>"]
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Replace(" ", "▁")
    tokenizer.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    every_byte = [f"<0x{n:02X}>" for n in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=700, special_tokens=special + every_byte, show_progress=False)
    tokenizer.train_from_iterator([s.replace(" ", "▁") for s in SENTENCES * 4], trainer)
    state = json.loads(tokenizer.to_str())
    state["added_tokens"] = [added for added in state["added_tokens"] if added["content"] in special]  # bytes are plain tokens
    tokenizer = Tokenizer.from_str(json.dumps(state))
    tokenizer.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 2)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>", unk_token="<unk>",
        mask_token="<mask>", additional_special_tokens=special[5:], chat_template=GEMMA_TEMPLATE, model_max_length=512,
    )  # fmt: skip
