"""Model folders made by somebody who means harm, and honest ones that look odd; `python -m tests.security.hostile_models`
brings each of them in as the studio does and prints what it said.

A hostile folder is a copy of the small model with something changed: `HOSTILE[name] = Case(change, words)`, where
`change(folder, secret)` may point at the file `secret` outside, and `words` must stand in the refusal.
"""

from __future__ import annotations

import json
import os
import pickle
import shutil
import struct
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

MARK = "LANTERN-4711"
"""Stands in every line of the file outside. It must be found nowhere."""

Change = Callable[[Path, Path], object]


class Case(NamedTuple):
    change: Change
    words: str


class Song:
    """Unpickling it writes a file named canary."""

    def __reduce__(self) -> tuple:
        return (os.system, ("touch canary",))


def write_secret(path: Path) -> Path:
    path.write_text("".join(f"{MARK}-line-{n}\n" for n in range(20)))
    return path


def put(folder: Path, name: str, **changes: Any) -> None:
    path = folder / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.is_file() else {}), **changes}))


def setting(name: str, **changes: Any) -> Change:
    """Keys laid into one JSON file; SECRET stands for the path of the file outside."""

    def change(folder: Path, secret: Path) -> None:
        put(folder, name, **json.loads(json.dumps(changes).replace("SECRET", str(secret))))

    return change


def text(name: str, data: str) -> Change:
    def change(folder: Path, secret: Path) -> None:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(data.replace("SECRET", str(secret)))

    return change


def raw(name: str, old: str, new: str) -> Change:
    """One piece of a JSON file replaced as text, for what json.dumps does not write."""

    def change(folder: Path, secret: Path) -> None:
        before = (folder / name).read_text()
        assert old in before
        (folder / name).write_text(before.replace(old, new))

    return change


def without_tokenizer_json(*changes: Change) -> Change:
    """The folder of a class that reads an own file, which transformers makes up, or takes from elsewhere, when it is missing."""

    def change(folder: Path, secret: Path) -> None:
        (folder / "tokenizer.json").unlink()
        for one in changes:
            one(folder, secret)

    return change


def deep(name: str) -> Change:
    return text(name, '{"model": ' + "[" * 200_000 + "]" * 200_000 + "}")


def link(name: str, target: str) -> Change:
    def change(folder: Path, secret: Path) -> None:
        (folder / name).unlink(missing_ok=True)
        (folder / name).symlink_to(target.replace("SECRET", str(secret)))

    return change


def pickled(name: str) -> Change:
    return lambda folder, secret: (folder / name).write_bytes(pickle.dumps(Song()))


def template(source: str) -> Change:
    return text("chat_template.jinja", source)


def tokenizer_part(**changes: Any) -> Change:
    """Something in the part `model` of tokenizer.json."""

    def change(folder: Path, secret: Path) -> None:
        written = json.loads((folder / "tokenizer.json").read_text())
        written["model"] |= changes
        (folder / "tokenizer.json").write_text(json.dumps(written))

    return change


def many_files(folder: Path, secret: Path) -> None:
    (folder / "more").mkdir()
    for n in range(10_001):
        (folder / "more" / str(n)).touch()


def long_header(folder: Path, secret: Path) -> None:
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 9 * 2**20) + b'{"a":' + b" " * 9 * 2**20)


BERT = {"tokenizer_class": "BertTokenizer", "unk_token": f"{MARK}-line-0"}
CONFIG, MAP, TOKENIZER = "tokenizer_config.json", "special_tokens_map.json", "tokenizer.json"
OTHER_FILE, UNKNOWN, VALUE, CODE = "another file than the model's own", "does not know", "cannot have", "load code"

HOSTILE: dict[str, Case] = {
    # A file of this machine read as vocabulary
    "map names vocab_file": Case(
        without_tokenizer_json(text("vocab.json", "{}"), setting(CONFIG, **BERT), text(MAP, '{"vocab_file": "SECRET"}')), OTHER_FILE
    ),
    "init_inputs": Case(without_tokenizer_json(text("vocab.json", "{}"), setting(CONFIG, **BERT, init_inputs=["SECRET"])), OTHER_FILE),
    "init_inputs beside tokenizer.json": Case(setting(CONFIG, init_inputs=["SECRET"]), OTHER_FILE),
    "init_inputs that are null": Case(setting(CONFIG, init_inputs=None), OTHER_FILE),
    "vocab_file": Case(setting(CONFIG, vocab_file="SECRET"), OTHER_FILE),
    "vocab_file up the tree": Case(setting(CONFIG, vocab_file="../../../../etc/passwd"), OTHER_FILE),
    "vocab_file in /proc": Case(setting(CONFIG, vocab_file="/proc/self/environ"), OTHER_FILE),
    "vocab_file at home": Case(setting(CONFIG, vocab_file="~/.ssh/id_rsa"), OTHER_FILE),
    "tokenizer_file": Case(setting(CONFIG, tokenizer_file="SECRET"), OTHER_FILE),
    "spm_file": Case(setting(CONFIG, spm_file="SECRET"), OTHER_FILE),
    "gguf_file": Case(setting(CONFIG, gguf_file="SECRET"), OTHER_FILE),
    "chat_template_file": Case(setting(CONFIG, chat_template_file="SECRET"), OTHER_FILE),
    "fast_tokenizer_files": Case(setting(CONFIG, fast_tokenizer_files=["../secret"]), OTHER_FILE),
    "vocab as a path": Case(without_tokenizer_json(text("vocab.txt", "a\n"), setting(CONFIG, **BERT, vocab="SECRET")), OTHER_FILE),
    "merges as a path": Case(setting(CONFIG, tokenizer_class="LlamaTokenizer", merges="SECRET"), OTHER_FILE),
    "tokenizer_object": Case(setting(CONFIG, tokenizer_object="SECRET"), OTHER_FILE),
    "map names merges_file": Case(setting(MAP, merges_file="SECRET"), OTHER_FILE),
    "map names tokenizer_file": Case(setting(MAP, tokenizer_file="SECRET"), OTHER_FILE),
    "map names vocab": Case(setting(MAP, vocab="SECRET"), OTHER_FILE),
    "map names a class": Case(setting(MAP, tokenizer_class="BertTokenizer"), UNKNOWN),
    "sentencepiece model_file": Case(setting(CONFIG, sp_model_kwargs={"model_file": "SECRET"}), VALUE),
    "a path where a word belongs": Case(setting(CONFIG, backend="SECRET"), VALUE),
    "a path as a class": Case(setting(CONFIG, tokenizer_class="../evil.Tokenizer"), VALUE),
    "a class of another kind": Case(without_tokenizer_json(setting(CONFIG, tokenizer_class="Wav2Vec2CTCTokenizer")), "no tokenizer"),
    "a class that reads tekken.json": Case(
        without_tokenizer_json(text("vocab.json", "{}"), setting(CONFIG, tokenizer_class="MistralCommonBackend")), "tokenizer.json only"
    ),
    "a class without its file": Case(without_tokenizer_json(text("vocab.json", "{}"), setting(CONFIG, **BERT)), "vocab.txt"),
    "a class without its model": Case(
        without_tokenizer_json(text("vocab.json", "{}"), setting(CONFIG, tokenizer_class="LlamaTokenizer")), "tokenizer.model"
    ),
    "no class and no file": Case(without_tokenizer_json(text("vocab.json", "{}"), text(CONFIG, "{}")), "tokenizer.model"),
    "tokenizer.model of another kind": Case(
        without_tokenizer_json(text("tokenizer.model", "YQ== 0\nYg== 1\n"), setting(CONFIG, tokenizer_class="LlamaTokenizer")),
        "not what SentencePiece writes",
    ),
    "an unknown key": Case(setting(CONFIG, device_map="auto"), UNKNOWN),
    "added tokens that are no numbers": Case(text("added_tokens.json", '{"<a>": "SECRET"}'), "does not hold what"),
    "a token with another part": Case(setting(CONFIG, eos_token={"content": "a", "path": "SECRET"}), VALUE),
    "a link to a file outside": Case(link("vocab.txt", "SECRET"), "leads out"),
    "a link as the tokenizer": Case(link(TOKENIZER, "SECRET"), "leads out"),
    "a link that leads to itself": Case(link("merges.txt", "merges.txt"), "leads out"),
    # Code
    "auto_map in config.json": Case(setting("config.json", auto_map={"AutoModel": "evil.Model"}), CODE),
    "auto_map of the tokenizer": Case(setting(CONFIG, auto_map={"AutoTokenizer": ["evil.Tok", None]}), CODE),
    "auto_map deep inside": Case(setting("config.json", rope_scaling={"a": [{"auto_map": {}}]}), CODE),
    "an attention kernel": Case(setting("config.json", _attn_implementation_internal="evil/kernel"), CODE),
    "custom_generate": Case(setting("generation_config.json", custom_generate="evil/repo"), CODE),
    "trust_remote_code": Case(setting("sentence_bert_config.json", model_args={"trust_remote_code": True}), CODE),
    "a module to import": Case(
        text("modules.json", '[{"idx": 0, "name": "0", "path": "", "type": "os.system"}]'), "does not hold what"
    ),
    "a module's folder up the tree": Case(
        text("modules.json", '[{"idx": 0, "name": "0", "path": "../..", "type": "sentence_transformers.models.Pooling"}]'),
        "does not hold what",
    ),
    "a pooling class": Case(setting("1_Pooling/config.json", type="evil.Pooling"), UNKNOWN),
    "a sentence tokenizer elsewhere": Case(setting("sentence_bert_config.json", tokenizer_name_or_path="SECRET"), OTHER_FILE),
    "a prompt that is an object": Case(setting("config_sentence_transformers.json", prompts={"a": {"b": "c"}}), VALUE),
    "pickled weights": Case(pickled("pytorch_model.bin"), "can run code"),
    "a pickle called safetensors": Case(pickled("model.safetensors"), "damaged"),
    # Templates
    "a template that escapes": Case(template("{{ ''.__class__.__mro__[1].__subclasses__() }}"), "template"),
    "a template that imports": Case(template("{{ cycler.__init__.__globals__.os.popen('touch canary').read() }}"), "template"),
    "a template that includes": Case(template("{% include 'SECRET' %}"), "template"),
    "a template without end": Case(
        template("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"), "seconds of processor time"
    ),
    "a template of gigabytes": Case(template("{% set n = 3000000000 + (messages|length) %}{% set x = 'ab' * n %}"), "memory"),
    "a template of gigabytes when compiled": Case(template("{% set x = 'ab' * 3000000000 %}{{ messages[0].content }}"), "memory"),
    "a template in a list without names": Case(setting(CONFIG, chat_template=[{"file": "SECRET"}]), VALUE),
    # Numbers, sizes and shapes
    "NaN": Case(raw("config.json", "1e-06", "NaN"), "holds NaN"),
    "Infinity": Case(raw("config.json", "1e-06", "-Infinity"), "holds -Infinity"),
    "a float beyond all floats": Case(raw("config.json", "1e-06", "1e999"), "holds Infinity"),
    "an integer beyond all floats": Case(setting("config.json", rms_norm_eps=10**400), VALUE),
    "NaN in the tokenizer": Case(text(CONFIG, '{"model_max_length": NaN}'), "holds NaN"),
    "45 MB of added tokens": Case(text("added_tokens.json", "[" + ",".join(["[]"] * 15_000_000) + "]"), "larger than 4 MiB"),
    "2 MB of config": Case(setting("config.json", id2label={"0": "a" * 2**21}), "larger than 1 MiB"),
    "lists as deep as a stack": Case(deep(TOKENIZER), "cannot be read"),
    "config as deep as a stack": Case(deep("config.json"), "cannot be read"),
    "a vocabulary that is a list": Case(text("vocab.json", "[1, 2]"), "does not hold what"),
    "a vocabulary that is a path": Case(tokenizer_part(vocab="/etc/passwd"), VALUE),
    "a tokenizer of another kind": Case(tokenizer_part(type="Evil"), VALUE),
    "an index up the tree": Case(setting("model.safetensors.index.json", weight_map={"a": "../../x.safetensors"}), VALUE),
    "an absolute index": Case(setting("model.safetensors.index.json", weight_map={"a": "SECRET"}), VALUE),
    "an index of missing files": Case(setting("model.safetensors.index.json", weight_map={"a": "model-2.safetensors"}), "is missing"),
    "more tokens than the model has": Case(setting("added_tokens.json", **{f"<{n}>": 512 + n for n in range(9)}), "tokens and the model"),
    "a long header": Case(long_header, "damaged"),
    "ten thousand files": Case(many_files, "more than 10,000 files"),
    "quantized weights": Case(setting("config.json", quantization_config={"load_in_4bit": True}), "quantized"),
    "a class in config.json": Case(setting("config.json", tokenizer_class="evil.Tokenizer"), UNKNOWN),
}  # fmt: skip


def bring_in(source: Path, into: Path) -> dict[str, Any]:
    """As the converting child does. Raises StudioError."""
    from worker.conversion.convert import from_folder

    into.mkdir()
    return from_folder(source, into)


def make(name: str, base: Path, folder: Path) -> Path:
    """The hostile folder of this name below `folder`, with the file outside beside it."""
    made = Path(shutil.copytree(base, folder / "model"))
    HOSTILE[name].change(made, write_secret(folder / "secret"))
    return made


# Honest ones --------------------------------------------------------------------------------------------------------

ADDED = {"__type": "AddedToken", "lstrip": False, "normalized": True, "rstrip": False, "single_word": False}


def _encoder(folder: Path, kind: str, vocabulary: int) -> None:
    """Weights of a tiny encoder."""
    import torch
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        kind, vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        AutoModel.from_config(config).save_pretrained(folder)


WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "/", "...", "~", "..", "the", "wood", "##en"]


def bert(folder: Path, base: Path) -> None:
    """WordPiece from vocab.txt alone, with what old versions of transformers wrote beside it."""
    _encoder(folder, "bert", len(WORDS))
    (folder / "vocab.txt").write_text("".join(f"{word}\n" for word in WORDS))
    put(
        folder, CONFIG, do_lower_case=True, unk_token="[UNK]", sep_token="[SEP]", pad_token="[PAD]", cls_token="[CLS]", mask_token="[MASK]",
        tokenize_chinese_chars=True, strip_accents=None, name_or_path="/home/somebody/models/bert", do_basic_tokenize=True, never_split=None,
        special_tokens_map_file="/root/.cache/huggingface/transformers/dd8bd9bf.json", tokenizer_file=None, tokenizer_class="BertTokenizer",
        model_max_length=1000000000000000019884624838656,
    )  # fmt: skip
    put(folder, "modules.json")
    (folder / "modules.json").write_text(
        json.dumps([{"idx": n, "name": str(n), "path": path, "type": f"sentence_transformers.models.{kind}"}
                    for n, (path, kind) in enumerate([("", "Transformer"), ("1_Pooling", "Pooling"), ("2_Normalize", "Normalize")])])
    )  # fmt: skip
    put(folder, "sentence_bert_config.json", max_seq_length=256, do_lower_case=False)
    put(folder, "config_sentence_transformers.json", __version__={"sentence_transformers": "2.0.0", "pytorch": "1.8.1"})
    put(folder, "1_Pooling/config.json", word_embedding_dimension=32, pooling_mode_mean_tokens=True, pooling_mode_cls_token=False)


def saved_bert(folder: Path, base: Path) -> None:
    """The same as save_pretrained writes it today."""
    from transformers import BertTokenizer

    _encoder(folder, "bert", len(WORDS))
    BertTokenizer(vocab={word: n for n, word in enumerate(WORDS)}).save_pretrained(folder)


def roberta(folder: Path, base: Path) -> None:
    """Byte-level from vocab.json and merges.txt."""
    model = json.loads((base / TOKENIZER).read_text())["model"]
    special = {token: 512 + n for n, token in enumerate(["<s>", "</s>", "<unk>", "<pad>", "<mask>"])}
    _encoder(folder, "roberta", 520)
    put(folder, "vocab.json", **model["vocab"], **special)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges]) + "\n")
    put(folder, CONFIG, tokenizer_class="RobertaTokenizerFast", errors="replace", trim_offsets=True, max_len=512, max_length=64, stride=0,
        pad_to_multiple_of=None, pad_token_type_id=0, truncation_side="right", truncation_strategy="longest_first")  # fmt: skip


def sentencepiece(folder: Path, base: Path) -> None:
    """A Llama whose tokenizer is SentencePiece's file alone."""
    from sentencepiece import SentencePieceTrainer

    from tests.tiny import SENTENCES

    shutil.copytree(base, folder, dirs_exist_ok=True)
    for name in (TOKENIZER, "chat_template.jinja"):
        (folder / name).unlink()
    SentencePieceTrainer.train(
        sentence_iterator=iter(SENTENCES), model_prefix=str(folder / "tokenizer"), vocab_size=400, model_type="bpe", byte_fallback=True,
        minloglevel=9,
    )  # fmt: skip
    (folder / CONFIG).write_text("{}")
    put(folder, CONFIG, tokenizer_class="LlamaTokenizer", add_bos_token=True, add_eos_token=False, sp_model_kwargs={}, legacy=True,
        bos_token={**ADDED, "content": "<s>"}, eos_token={**ADDED, "content": "</s>"}, unk_token={**ADDED, "content": "<unk>"},
        pad_token=None, padding_side="right", use_default_system_prompt=False, start_n_top=None, handle_chinese_chars=True,
        wordpieces_prefix="##")  # fmt: skip
    put(folder, MAP, bos_token={"content": "<s>", "lstrip": False, "normalized": False, "rstrip": False, "single_word": False})


def rich(folder: Path, base: Path) -> None:
    """What newer repositories add: named tokens, several templates, a processor's name, all that generation can be told."""
    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "chat_template.jinja").unlink()
    plain = "{% for m in messages %}{{ '../' + m.content }}{% endfor %}"
    part = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False, "special": True}
    put(folder, CONFIG, boi_token="<|im_start|>", extra_special_tokens={"boi_token": "<|im_start|>"}, processor_class="Gemma3Processor",
        added_tokens_decoder={"0": {"content": "<|endoftext|>", **part}, "1": {"content": "<|im_start|>", **part}},
        chat_template=[{"name": "default", "template": plain}, {"name": "tool_use", "template": plain}],
        split_special_tokens=False, spaces_between_special_tokens=False, model_input_names=["input_ids", "attention_mask"],
        transformers_version="4.57.0.dev0", is_local=False)  # fmt: skip
    put(folder, "generation_config.json", do_sample=True, temperature=0.7, top_k=20, cache_implementation="hybrid",
        eos_token_id=[2, 0], stop_strings=["/"], _from_model_config=True, user_token_id=195, bad_words_ids=[[1, 2]])  # fmt: skip
    put(folder, "config.json", _name_or_path="/workspace/outputs/step-500", finetuning_task="glue/sst2",
        id2label={"0": "a/b", "1": ".."}, label2id={"a/b": 0, "..": 1}, rope_scaling=None)  # fmt: skip


def shards(folder: Path, base: Path) -> None:
    """Weights in several files."""
    from transformers import AutoModelForCausalLM

    shutil.copytree(base, folder, dirs_exist_ok=True)
    (folder / "model.safetensors").unlink()
    AutoModelForCausalLM.from_pretrained(base).save_pretrained(folder, max_shard_size="200KB")


def again(folder: Path, base: Path) -> None:
    """A folder that the studio itself wrote, brought in once more."""
    bring_in(base, folder / "kept")
    for path in (folder / "kept").iterdir():
        path.rename(folder / path.name)


def plain(folder: Path, base: Path) -> None:
    shutil.copytree(base, folder, dirs_exist_ok=True)


HONEST: dict[str, Callable[[Path, Path], None]] = {
    "the small model": plain, "WordPiece from vocab.txt": bert, "WordPiece as saved today": saved_bert, "byte-level from vocab.json": roberta,
    "SentencePiece's file alone": sentencepiece, "what newer repositories add": rich, "weights in shards": shards, "our own, again": again,
}  # fmt: skip


# The table ----------------------------------------------------------------------------------------------------------


def main() -> None:
    from app.errors import StudioError
    from tests.tiny import build_model
    from worker.conversion import convert

    convert.TRIAL_SECONDS = 4  # so that the endless template does not take a minute
    with tempfile.TemporaryDirectory(prefix="hostile-") as place:
        os.chdir(place)
        base = build_model(Path(place) / "base")
        refused = passed = 0
        for number, name in enumerate([*HOSTILE, *HONEST]):
            folder = Path(place) / str(number)
            folder.mkdir()
            if name in HOSTILE:
                source = make(name, base, folder)
            else:
                source = folder / "model"
                source.mkdir()
                HONEST[name](source, base)
            began = time.monotonic()
            try:
                said = f"ready, {bring_in(source, folder / 'into')['kind']}"
                passed += name in HONEST
            except StudioError as error:
                said = error.message
                refused += name in HOSTILE and HOSTILE[name].words in said and MARK not in said
            print(f"{name:40} {time.monotonic() - began:6.2f} s  {said[:150]}", flush=True)
            shutil.rmtree(folder)
        canary = (Path(place) / "canary").exists()
    print(f"{refused} of {len(HOSTILE)} hostile folders refused in the expected words, {passed} of {len(HONEST)} honest ones ready, "
          f"{'A CANARY SANG' if canary else 'no canary sang'}")  # fmt: skip
    sys.exit(refused != len(HOSTILE) or passed != len(HONEST) or canary)


if __name__ == "__main__":
    main()
