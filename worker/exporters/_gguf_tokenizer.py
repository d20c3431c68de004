"""A tokenizer of transformers as the keys of a GGUF file.

llama.cpp does not read tokenizer.json: it has its own tokenizers, chosen by `tokenizer.ggml.model` and, for byte-level BPE, splits a
text by the rule named in `tokenizer.ggml.pre` before it merges. A wrong rule gives other token ids for numbers, spaces or line
breaks and nobody notices, so a tokenizer whose parts are not exactly one of those known here is refused.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

from gguf import TokenType

from app.errors import Unsupported
from worker.data.chat_template import stop_ids

_CONTRACTIONS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LETTERS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
SPLITS = {
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}{{1,3}}|{_REST}": "llama-bpe",
    rf"{_CONTRACTIONS}|{_LETTERS}|\p{{N}}|{_REST}": "qwen2",
}
"""Regular expression that a byte-level BPE splits by → `tokenizer.ggml.pre`."""


class Vocabulary(NamedTuple):
    """The keys below `tokenizer.ggml.`; `pre` and `merges` of byte-level BPE, `scores` of SentencePiece."""

    model: str
    tokens: list[str]
    types: list[int]
    pre: str | None = None
    merges: list[str] | None = None
    scores: list[float] | None = None
    ids: dict[str, int] = {}  # noqa: RUF012
    add_bos: bool = False
    template: str | None = None


def read(folder: Path, vocabulary: int) -> Vocabulary:
    """The tokenizer in `folder` of a model whose embedding has `vocabulary` rows. Raises Unsupported naming the part that is not known."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    parts: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    if parts["model"].get("type") != "BPE":
        raise _unknown(f"its tokenizer is of the kind {parts['model'].get('type')}")
    made = _byte_level(parts, vocabulary) if not parts["model"].get("byte_fallback") else _sentencepiece(parts, vocabulary)
    ends = _ends(folder, tokenizer)
    ids = {
        "bos": tokenizer.bos_token_id,
        "eos": tokenizer.eos_token_id,
        "unknown": tokenizer.unk_token_id,
        "padding": tokenizer.pad_token_id,
    }
    ids |= {"eot": next((i for i in ends if i != tokenizer.eos_token_id), None)}
    first = tokenizer("a").input_ids[:1]
    return made._replace(
        ids={name: i for name, i in ids.items() if i is not None},
        add_bos=tokenizer.bos_token_id is not None and first == [tokenizer.bos_token_id],
        template=tokenizer.chat_template if isinstance(tokenizer.chat_template, str) else None,
    )


def _ends(folder: Path, tokenizer: Any) -> list[int]:
    """Ids that end an answer: the tokenizer's, those of the generation config, and the one that the chat template closes a turn with."""
    path = folder / "generation_config.json"
    named = json.loads(path.read_text()).get("eos_token_id") if path.is_file() else None
    return stop_ids(tokenizer, SimpleNamespace(eos_token_id=named))


def _unknown(why: str) -> Unsupported:
    return Unsupported(
        f"This model cannot be written as GGUF: {why}, and llama.cpp would make other tokens of the same text.",
        hint="Download the merged model and convert it with llama.cpp's own converter, or choose another format.",
    )


def _types(parts: dict[str, Any], tokens: list[str | None]) -> tuple[list[str], list[int]]:
    """Every token with its type; ids that no token has are filled, as llama.cpp's own converter does."""
    types = [int(TokenType.NORMAL)] * len(tokens)
    for added in parts["added_tokens"]:
        if added["id"] >= len(tokens):
            raise Unsupported(f"The token {added['content'][:40]!r} has no row in the embedding.", hint="Add the model again.")
        tokens[added["id"]] = added["content"] if added["special"] else added["content"].replace("▁", " ")
        types[added["id"]] = int(TokenType.CONTROL if added["special"] else TokenType.USER_DEFINED)
    for i, token in enumerate(tokens):
        if token is None:
            tokens[i], types[i] = f"[PAD{i}]", int(TokenType.UNUSED)
    return [token or "" for token in tokens], types


def _by_id(parts: dict[str, Any], vocabulary: int) -> list[str | None]:
    tokens: list[str | None] = [None] * vocabulary
    for token, i in parts["model"]["vocab"].items():
        if i >= vocabulary:
            raise Unsupported(f"The token {token[:40]!r} has no row in the embedding.", hint="Add the model again.")
        tokens[i] = token
    return tokens


def _merges(parts: dict[str, Any]) -> list[tuple[str, str]]:
    return [cast("tuple[str, str]", tuple(merge.split(" ", 1) if isinstance(merge, str) else merge)) for merge in parts["model"]["merges"]]


# Byte-level BPE -------------------------------------------------------------------------------------------------------


def _byte_level(parts: dict[str, Any], vocabulary: int) -> Vocabulary:
    tokens, types = _types(parts, _by_id(parts, vocabulary))
    return Vocabulary("gpt2", tokens, types, pre=_rule(parts), merges=[" ".join(merge) for merge in _merges(parts)])


def _rule(parts: dict[str, Any]) -> str:
    """`tokenizer.ggml.pre`. Raises Unsupported."""
    splitter = parts["pre_tokenizer"] or {}
    steps = splitter.get("pretokenizers", [splitter])
    kinds = [step.get("type") for step in steps]
    last = steps[-1]
    if kinds[-1:] != ["ByteLevel"] or last.get("add_prefix_space"):
        raise _unknown(f"its tokenizer splits a text by {' and '.join(map(str, kinds)) or 'nothing'}")
    if kinds == ["ByteLevel"] and last.get("use_regex", True):
        return "gpt-2"
    if kinds == ["Digits", "ByteLevel"] and steps[0]["individual_digits"] and last.get("use_regex", True):
        return "smollm"
    if kinds == ["Split", "ByteLevel"] and not last.get("use_regex", True) and steps[0].get("behavior") == "Isolated":
        pattern = steps[0]["pattern"].get("Regex", "")
        if pattern in SPLITS:
            return SPLITS[pattern]
        raise _unknown(f"its tokenizer splits a text by a rule that is not known here ({pattern[:60]} …)")
    raise _unknown(f"its tokenizer splits a text by {' and '.join(map(str, kinds))} in a way that is not known here")


# SentencePiece --------------------------------------------------------------------------------------------------------


def _sentencepiece(parts: dict[str, Any], vocabulary: int) -> Vocabulary:
    """A BPE with byte fallback, as transformers makes of SentencePiece models. A merge's rank becomes the score of what it makes:
    llama.cpp merges the two neighbors first whose union scores highest."""
    if not _only_replaces_spaces(parts["normalizer"]):
        raise _unknown("its tokenizer changes a text before it is split, by more than writing ▁ for a space")
    tokens = _by_id(parts, vocabulary)
    merges = _merges(parts)
    lowest = float(-len(merges) - 1)
    rank: dict[str, int] = {}
    for place, merge in enumerate(merges):
        rank.setdefault("".join(merge), place)
    scores = [-float(rank[token]) if token in rank else lowest for token in (t or "" for t in tokens)]
    named, types = _types(parts, tokens)
    unknown = parts["model"].get("unk_token")
    for i, token in enumerate(named):
        if re.fullmatch(r"<0x[0-9A-F]{2}>", token):
            types[i] = int(TokenType.BYTE)
        elif token == unknown:
            types[i] = int(TokenType.UNKNOWN)
    return Vocabulary("llama", named, types, scores=scores)


def _only_replaces_spaces(normalizer: dict[str, Any] | None) -> bool:
    """Whether all that happens to a text before it is split is that a space becomes ▁."""
    steps = normalizer.get("normalizers", [normalizer]) if normalizer else []
    return [(step["type"], step.get("pattern"), step.get("content")) for step in steps] == [("Replace", {"String": " "}, "▁")]
