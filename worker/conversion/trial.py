"""Tries out the tokenizer and template of a model that is imported. Runs in a fork with limits (`worker/runtime/limited_fork.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from app.errors import BadData, StudioError, Unsupported
from app.models import import_checks
from app.shapes import STRUCTURE, Shape

CONVERSATION = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": "Good day."}]

_MADE_UP = frozenset(
    ("<s>", "</s>", "<unk>", "<pad>", "<mask>", "<bos>", "<eos>", "<|endoftext|>", "[UNK]", "[SEP]", "[PAD]", "[CLS]", "[MASK]",
     "▁<PRE>", "▁<MID>", "▁<SUF>", "▁<EOT>", "<FILL_ME>")
)  # fmt: skip
"""Tokens that the classes in `import_checks.TOKENIZERS` add by themselves."""


def look_at(folder: Path, rewrite: bool) -> dict[str, Any]:
    """`{"shape", "chat_template"}` of a folder that passes. Raises StudioError."""
    shape, kept = import_checks.check_folder(folder)
    if shape is None:
        shape = read_shape(kept["config.json"])
        kept["config.json"][STRUCTURE] = shape.model_dump(mode="json")
    if rewrite:
        for name, value in kept.items():
            (folder / name).write_text(json.dumps(value, indent=1, ensure_ascii=False))
    tokenizer = load(folder)
    if shape.encodes and rewrite:
        tokenizer.chat_template = question_and_answer(tokenizer, kept["config.json"])
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template)
    if len(tokenizer) > shape.vocabulary:
        raise BadData(
            f"The tokenizer has {len(tokenizer):,} tokens and the model {shape.vocabulary:,}.", hint="Take both from the same model."
        )
    check_vocabulary(tokenizer, folder, kept)
    return {"shape": shape.model_dump(), "chat_template": has_working_template(tokenizer)}


def read_shape(config: dict[str, Any]) -> Shape:
    """The shape of a language model or an encoder, from the model built without weights. Raises Unsupported or BadData."""
    import torch
    from transformers import __version__ as transformers_version
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    from worker.conversion.structure import shape_of_model
    from worker.modeling.auto import maker_for

    kind = config["model_type"]
    if kind not in CONFIG_MAPPING:
        raise Unsupported(
            f"The architecture {kind!r} is not one that the installed transformers ({transformers_version}) knows.",
            hint="Upgrade transformers, or choose another model.",
            param="path",
        )
    hidden = sorted(key for key in config if callable(getattr(CONFIG_MAPPING[kind], key, None)))
    if hidden:
        raise Unsupported(f"config.json has the key {hidden[0][:60]!r}, which is no setting.", hint="Remove the key.", param="path")
    try:
        made = CONFIG_MAPPING[kind].from_dict(_with_infinities({key: value for key, value in config.items() if key != STRUCTURE}))
        with torch.device("meta"):
            encoder = is_encoder(config) and not made.is_encoder_decoder
            model: Any = maker_for(made, encoder=encoder).from_config(made)
        if encoder:
            shape = shape_of_model(model, "encoder")
        else:
            model.tie_weights()
            shape = shape_of_model(model)
    except (MemoryError, StudioError):
        raise
    except Exception as error:
        raise Unsupported(
            f"No language model can be made from this config.json ({kind}): {type(error).__name__}: {str(error)[:200]}",
            hint="Save the model again with save_pretrained(), or choose another one.",
            param="path",
        ) from error
    import_checks.check_widths(shape)
    return shape


def _with_infinities(value: Any) -> Any:
    """A value of config.json in which what JSON cannot write is a number again: transformers writes `{"__float__": "Infinity"}`."""
    if isinstance(value, dict):
        if value.keys() == {"__float__"} and value["__float__"] in ("Infinity", "-Infinity", "NaN"):
            return float(value["__float__"])
        return {key: _with_infinities(one) for key, one in value.items()}
    return [_with_infinities(one) for one in value] if isinstance(value, list) else value


_QUESTION_AND_ANSWER = """{{%- for message in messages -%}}
{{%- if loop.first -%}}{lead}{{%- endif -%}}
{{%- if message.role == "assistant" and loop.last -%}}{edge}{{{{ message.content }}}}{end}
{{%- else -%}}{{%- if not loop.first %}}{{{{ "\n" }}}}{{% endif -%}}{{{{ message.content }}}}
{{%- endif -%}}
{{%- endfor -%}}
{{%- if add_generation_prompt -%}}{edge}{{%- endif -%}}"""


def question_and_answer(tokenizer: Any, config: dict[str, Any]) -> str:
    """The chat template of an encoder–decoder: what was said so far is the encoder's text, and the last answer the decoder's. Between them
    stand the end of a text and the token that a decoder begins with, by which `worker/modeling/padded.py` tells them apart."""
    if tokenizer.eos_token is None or config.get("decoder_start_token_id") is None:
        raise Unsupported(
            "The encoder–decoder names no end-of-text token, or no token that its answers begin with.",
            hint="Add eos_token to tokenizer_config.json and decoder_start_token_id to config.json.",
        )
    start = config["decoder_start_token_id"]
    if start not in range(len(tokenizer)):
        raise Unsupported(
            f"The decoder begins with the token {start} (decoder_start_token_id of config.json), and the tokenizer has {len(tokenizer):,}.",
            hint="Check that config.json and the tokenizer belong to one model.",
        )
    framed = tokenizer("")["input_ids"]
    lead = tokenizer.convert_ids_to_tokens(framed[:-1] if framed[-1:] == [tokenizer.eos_token_id] else [])
    first = tokenizer.convert_ids_to_tokens(start)
    lead, edge, end = ("{{ " + json.dumps("".join(part)) + " }}" for part in (lead, [tokenizer.eos_token, first], [tokenizer.eos_token]))
    return _QUESTION_AND_ANSWER.format(lead=lead, edge=edge, end=end)


def is_encoder(config: dict[str, Any]) -> bool:
    """Whether a config is that of an encoder: an architecture that fills in masked tokens, unless it was saved as one that writes."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as WRITERS
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED

    writes = config.get("is_decoder") or any(str(name).endswith(("CausalLM", "LMHeadModel")) for name in config.get("architectures") or [])
    return config["model_type"] in MASKED and not (config["model_type"] in WRITERS and writes)


def load(folder: Path) -> Any:
    """The tokenizer as every worker loads it. A library's error message is not repeated: it may quote what it read."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except MemoryError:
        raise
    except Exception as error:
        raise BadData(
            f"The tokenizer cannot be read ({type(error).__name__}).", hint="Save the tokenizer again with save_pretrained()."
        ) from error


def check_vocabulary(tokenizer: Any, folder: Path, kept: dict[str, Any]) -> None:
    """Check that every loaded token is in the folder's own files under the same id, or is named there. Raises BadData.

    So nothing that a library may read from elsewhere, now or in a later version, becomes part of a model.
    """
    own, named = own_vocabulary(folder, kept), named_tokens(kept) | _MADE_UP
    strange = sum(token not in named and own.get(token, -1) not in (key, None) for token, key in tokenizer.get_vocab().items())
    if strange:
        raise BadData(
            f"The tokenizer that was loaded has {strange:,} tokens that the folder's own files do not name under these ids.",
            hint="Save the tokenizer again with save_pretrained().",
        )


def own_vocabulary(folder: Path, kept: dict[str, Any]) -> dict[str, int | None]:
    """`{token: id}` of the folder's vocabulary files; None where the class that reads the file assigns the ids."""
    if written := kept.get("tokenizer.json"):
        vocab = written["model"]["vocab"]
        found = dict(vocab) if isinstance(vocab, dict) else {pair[0]: place for place, pair in enumerate(vocab)}
        return found | {token["content"]: token["id"] for token in written.get("added_tokens") or []}
    found = dict(kept.get("vocab.json") or {})
    if (folder / "vocab.txt").is_file():
        for line in (folder / "vocab.txt").open(encoding="utf-8"):
            found |= {line.rstrip("\n"): None, line.rstrip(): None}
    if (folder / "tokenizer.model").is_file():
        from sentencepiece import SentencePieceProcessor

        try:
            pieces = SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
        except (RuntimeError, OSError):
            raise Unsupported("tokenizer.model is not what SentencePiece writes.", hint="Save tokenizer.json next to it.") from None
        found |= dict.fromkeys(map(pieces.id_to_piece, range(pieces.get_piece_size())))
    return found


def named_tokens(kept: dict[str, Any]) -> set[str]:
    """The contents of all tokens that the small files name, for whatever purpose."""
    stack: list[Any] = [kept.get("tokenizer_config.json"), kept.get("special_tokens_map.json")]
    found = set(kept.get("added_tokens.json") or ())
    while stack:
        item = stack.pop()
        if isinstance(item, str):
            found.add(item)
        elif isinstance(item, (dict, list)):
            stack.extend(item.values() if isinstance(item, dict) else item)
    return found


def has_working_template(tokenizer: Any) -> bool:
    """Whether the tokenizer renders a conversation, in transformers' sandbox.

    Raises Unsupported when there is a template and it fails on the simplest conversation.
    """
    if not tokenizer.chat_template:
        return False
    try:
        text = tokenizer.apply_chat_template(CONVERSATION, tokenize=False)
    except MemoryError:
        raise
    except Exception as error:
        raise Unsupported(
            f"The model's chat template fails on a plain conversation: {str(error)[:200]}", hint="Fix or remove the template."
        ) from error
    if "Hello." not in text or len(text) > 100_000:
        raise Unsupported("The model's chat template does not write what it is given.", hint="Fix or remove the template.")
    return True
