"""A model's tokenizer without transformers and torch, with the methods that `worker/data/chat_template.py` needs and no more.

A child process that shows rows or counts tokens starts in a fraction of a second with it. Tests compare it with transformers' own
tokenizer, id for id.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, cast


class LightTokenizer:
    """The tokenizer of a folder with a tokenizer.json."""

    def __init__(self, folder: Path) -> None:
        from tokenizers import Tokenizer

        self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        config = _json(folder / "tokenizer_config.json")
        named = _json(folder / "special_tokens_map.json") | config
        self.special = {name: _text(named[name]) for name in _NAMES if named.get(name)}
        more = named.get("additional_special_tokens") or named.get("extra_special_tokens") or []
        self._more = [_text(token) for token in (more.values() if isinstance(more, dict) else more)]
        self.chat_template = _template_of(folder, config)
        self.added_tokens_decoder = self._tokenizer.get_added_tokens_decoder()
        self.pad_token = self.special.get("pad_token")

    def __getattr__(self, name: str) -> Any:
        if name.endswith("_token_id"):
            token = self.pad_token if name == "pad_token_id" else self.special.get(name.removesuffix("_id"))
            return None if token is None else self._tokenizer.token_to_id(token)
        if name in _NAMES:
            return self.special.get(name)
        raise AttributeError(name)

    def __len__(self) -> int:
        return self._tokenizer.get_vocab_size()

    @property
    def special_tokens_map(self) -> dict[str, str]:
        """The special tokens by name, as chat templates refer to them."""
        return self.special | ({"pad_token": self.pad_token} if self.pad_token else {})

    @property
    def all_special_tokens(self) -> list[str]:
        return list(dict.fromkeys([*self.special.values(), *self._more]))

    @property
    def all_special_ids(self) -> list[int]:
        return [cast("int", self._tokenizer.token_to_id(token)) for token in self.all_special_tokens]

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = True) -> dict[str, list[int]]:
        return {"input_ids": self._tokenizer.encode(text, add_special_tokens=add_special_tokens).ids}

    def encode_many(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, without special tokens; on all cores, and without the GIL."""
        return [encoding.ids for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def count_many(self, texts: list[str]) -> list[int]:
        """Number of ids of each text, without building lists of them."""
        return [len(encoding) for encoding in self._tokenizer.encode_batch_fast(texts, add_special_tokens=False)]

    def spans(self, text: str) -> list[str]:
        """The text of each token as it is in `text`, including the space before it; special tokens by their names."""
        encoding, texts, at = self._tokenizer.encode(text), [], 0
        for token, framing, (_, end) in zip(encoding.tokens, encoding.special_tokens_mask, encoding.offsets, strict=True):
            texts.append(token if framing else text[at : max(at, end)])
            at = at if framing else max(at, end)
        return texts

    def pieces(self, ids: list[int]) -> list[str]:
        """The text of each token. A character that spans several tokens belongs to the last of them."""
        texts: list[str] = []
        waiting: list[int] = []
        for key in ids:
            if key in self.added_tokens_decoder:
                texts.append(str(self.added_tokens_decoder[key]))
                waiting = []
                continue
            token = self._tokenizer.id_to_token(key) or ""
            waiting.append(key)
            text = self._tokenizer.decode(waiting, skip_special_tokens=False)
            if text.endswith("\ufffd") and len(waiting) < 4:
                texts.append("")
                continue
            texts.append(" " + text.lstrip(" ") if token.startswith("\u2581") else text)
            waiting = []
        return texts


_NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}


def _text(token: Any) -> str:
    return token["content"] if isinstance(token, dict) else str(token)


def _template_of(folder: Path, config: dict[str, Any]) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text()
    template = config.get("chat_template")
    if isinstance(template, list):  # several by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template
