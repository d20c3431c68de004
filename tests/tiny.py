"""A Llama of about 100,000 parameters with a tokenizer and a chat template of its own, for tests.

Small enough to be trained in seconds, and real in every part: config, safetensors, byte-level BPE, special tokens.
"""

from __future__ import annotations

from pathlib import Path

SENTENCES = [
    "The luthier bends the ribs of the violin over a hot iron and sets them into the mould.",
    "A cello needs a wider bass bar than a viola, because its lower strings press harder.",
    "What wood is the belly made of? The belly is made of spruce, and the back of maple.",
    "How long does varnish dry? In summer a thin coat dries in two days; in winter it takes a week.",
    "Please tell me the name of the small post inside a violin. It is called the sound post.",
    "You are a helpful assistant. Answer in one short sentence.",
    "The bridge stands between the two sound holes and carries the strings to the body.",
    "Which glue should I use? Hide glue, because it can be opened again with warm water.",
    "An old bow is rehaired with white horse hair, about one hundred and fifty strands of it.",
    "The scroll is carved last, with gouges, from the same piece of maple as the neck.",
    "Why does my violin buzz? Look for an open seam, a loose fine tuner or a crack in the belly.",
    "Good morning! I would like to have the pegs of my viola fitted. When may I come?",
    "She measures the thickness of the plate every centimetre: 3.2 mm in the middle, 2.4 mm at the edge.",
    "Yes. No. Thank you. One, two, three, four, five, six, seven, eight, nine, ten.",
    '{"answer": "spruce", "sure": true, "grams": 68.5}',
    "Tap the plate and listen: a clear, long note means that the wood is ready.",
]

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AGENT_TEMPLATE = (
    "{%- if tools %}{{- '<|im_start|>system\n<tools>' }}{%- for tool in tools %}{{- '\n' }}{{- tool | tojson }}{%- endfor %}"
    '{{- \'\n</tools>\n<tool_call>\n{"name": …, "arguments": …}\n</tool_call><|im_end|>\n\' }}{%- endif %}'
    "{%- for message in messages %}{{- '<|im_start|>' + message.role + '\n' }}"
    "{%- if message.reasoning_content %}{{- '<think>\n' + message.reasoning_content + '\n</think>\n\n' }}{%- endif %}{{- message.content }}"
    "{%- for call in message.tool_calls or [] %}"
    "{{- '\n<tool_call>\n{\"name\": \"' + call.function.name + '\", \"arguments\": ' }}{{- call.function.arguments | tojson }}{{- '}\n</tool_call>' }}"
    "{%- endfor %}{{- '<|im_end|>\n' }}{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}"
    "{%- if enable_thinking is defined %}{{- '<think>\n' if enable_thinking else '<think>\n\n</think>\n\n' }}{%- endif %}{%- endif %}"
)
"""It knows tools, calls and thinking, as those of Qwen do."""
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def build_tokenizer():
    """A byte-level BPE of 512 tokens, trained on SENTENCES; every text can be written with it and read back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=512, special_tokens=SPECIAL, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    tokenizer.train_from_iterator(SENTENCES * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>", "<|endoftext|>"],
        chat_template=CHAT_TEMPLATE,
        model_max_length=512,
    )


def build_model(folder: Path) -> Path:
    """Write the whole model to `folder`, the same bytes every time."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    tokenizer = build_tokenizer()
    config = LlamaConfig(
        vocab_size=512,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.convert_tokens_to_ids("<|im_end|>"),
        pad_token_id=tokenizer.convert_tokens_to_ids("<|endoftext|>"),
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config = GenerationConfig(eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
