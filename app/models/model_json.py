"""Allow-lists for the JSON files of a model: which keys, and which values.

A library that opens a tokenizer passes every key it does not know to the class it instantiates, so one key can name a file of
this machine to be read as a vocabulary, or code to be imported. So the lists name what is allowed, for values too: where no free
text belongs there is a number, a flag or a single word, none of which can be a path. Token contents, templates, labels and
prompts are free text, because nothing opens them.

    check("tokenizer_config.json", value)   the value without keys that only say where a file used to be; or it raises
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from app.errors import BadData, Unsupported
from app.languages import gettext
from app.shapes import STRUCTURE

MIB = 2**20
MAX_BYTES = {
    "config.json": MIB,
    "generation_config.json": MIB // 4,
    "tokenizer.json": 64 * MIB,  # one with 256k tokens has 33 MB
    "vocab.json": 16 * MIB,
    "tokenizer_config.json": 8 * MIB,  # 256k reserved tokens by name take some megabytes
    "special_tokens_map.json": MIB,
    "added_tokens.json": 4 * MIB,
    "model.safetensors.index.json": 4 * MIB,
    "modules.json": MIB // 16,
    "sentence_bert_config.json": MIB // 16,
    "config_sentence_transformers.json": MIB // 4,
    "1_Pooling/config.json": MIB // 16,
}
"""The JSON files that are read, and their maximum sizes."""

Rule = Callable[[Any], bool]


# Values -------------------------------------------------------------------------------------------------------------


def _null(value: Any) -> bool:
    return value is None


def _object(value: Any) -> bool:
    return value is None or isinstance(value, dict)


def _flag(value: Any) -> bool:
    return value is None or isinstance(value, bool)


def _number(value: Any) -> bool:
    """A number or null. `model_max_length` is 10^30 for no limit."""
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= 1e31)


def _word(value: Any) -> bool:
    """A name such as `bfloat16`, `longest_first` or `4.57.0`: no slash, no two dots, so never a path."""
    return value is None or (isinstance(value, str) and re.fullmatch(r"[\w+:-]{0,100}(\.[\w+:-]{1,100}){0,8}", value) is not None)


def _scalar(value: Any) -> bool:
    return _flag(value) or _number(value) or _word(value)


def _text(value: Any) -> bool:
    """Text that nothing opens or imports."""
    return value is None or (isinstance(value, str) and len(value) <= MIB)


def _list(rule: Rule) -> Rule:
    return lambda value: value is None or (isinstance(value, list) and all(map(rule, value)))


def _map(key: Rule, rule: Rule) -> Rule:
    return lambda value: value is None or (isinstance(value, dict) and all(key(k) and rule(v) for k, v in value.items()))


def _either(*rules: Rule) -> Rule:
    return lambda value: any(rule(value) for rule in rules)


def _only(**rules: Rule) -> Rule:
    """An object with at most these keys."""
    return lambda value: isinstance(value, dict) and all(k in rules and rules[k](v) for k, v in value.items())


def _any_of_words(value: Any) -> bool:
    """Numbers, flags, words, and lists and objects of them to any depth."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            if not all(map(_word, item)):
                return False
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
        elif not _scalar(item):
            return False
    return True


_TOKEN_PARTS = {name: _flag for name in ("single_word", "lstrip", "rstrip", "normalized", "special")}
_TOKEN = _either(_text, _only(__type=lambda v: v == "AddedToken", content=lambda v: isinstance(v, str), id=_number, **_TOKEN_PARTS))
_TOKENS = _either(_list(_TOKEN), _map(_word, _TOKEN))
_NUMBERS = _either(_number, _list(_number), _list(_list(_number)))
_PLAIN = _either(_scalar, _list(_scalar))


# Keys ---------------------------------------------------------------------------------------------------------------


def _rules(**groups: tuple[Rule, str]) -> dict[str, Rule]:
    return {name: rule for rule, names in groups.values() for name in names.split()}


_CONFIG = _rules(
    words=(_word, "model_type torch_dtype dtype transformers_version hidden_act hidden_activation position_embedding_type problem_type"),
    lists=(_list(_word), "architectures layer_types"),
    texts=(_text, "_name_or_path name_or_path finetuning_task"),
    labels=(_map(_text, _either(_text, _number)), "id2label label2id"),
    rope=(_map(_word, _either(_PLAIN, _map(_word, _PLAIN))), "rope_scaling rope_parameters"),
    ids=(
        _either(_number, _list(_number)),
        "bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id cls_token_id decoder_start_token_id",
    ),
    flags=(
        _flag,
        "attention_bias mlp_bias use_bias gradient_checkpointing rope_interleaved is_llama_config use_sliding_window "
        "use_bidirectional_attention tie_word_embeddings use_cache is_decoder add_cross_attention use_mrope output_past "
        "return_dict output_attentions output_hidden_states is_encoder_decoder",
    ),
    numbers=(
        _number,
        "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads num_key_value_heads head_dim "
        "max_position_embeddings type_vocab_size rms_norm_eps layer_norm_eps initializer_range initializer_factor attention_dropout "
        "attention_probs_dropout_prob hidden_dropout_prob classifier_dropout hidden_dropout rope_theta rope_local_base_freq "
        "sliding_window max_window_layers sliding_window_pattern _sliding_window_pattern attn_logit_softcapping "
        "final_logit_softcapping query_pre_attn_scalar pretraining_tp cross_attention_hidden_size num_labels chunk_size_feed_forward",
    ),
)
_CONFIG["transformers.js_config"] = _object

_GENERATION = _rules(
    numbers=(
        _NUMBERS,
        "max_length max_new_tokens min_length min_new_tokens max_time num_beams num_beam_groups penalty_alpha temperature top_k top_p "
        "min_p top_h typical_p epsilon_cutoff eta_cutoff diversity_penalty repetition_penalty encoder_repetition_penalty length_penalty "
        "no_repeat_ngram_size encoder_no_repeat_ngram_size bad_words_ids suppress_tokens begin_suppress_tokens forced_decoder_ids "
        "num_return_sequences guidance_scale prompt_lookup_num_tokens max_matching_ngram_size num_assistant_tokens max_window_size "
        "assistant_confidence_threshold exponential_decay_length_penalty prefill_chunk_size max_cache_len",
    ),
    plain=(
        _scalar,
        "do_sample early_stopping use_cache renormalize_logits remove_invalid_values low_memory token_healing is_assistant "
        "disable_compile output_attentions output_hidden_states output_scores output_logits return_dict_in_generate "
        "num_assistant_tokens_schedule cache_implementation chat_format transformers_version _from_model_config",
    ),
    texts=(_either(_text, _list(_text)), "stop_strings"),
)

_TOKENIZER = _rules(
    flags=(
        _flag,
        "add_bos_token add_eos_token clean_up_tokenization_spaces clean_up_tokenization_spaces_for_bpe_even_though_it_will_corrupt_output "
        "do_lower_case do_basic_tokenize tokenize_chinese_chars handle_chinese_chars strip_accents clean_text lowercase add_prefix_space "
        "trim_offsets legacy legacy_behaviour use_default_system_prompt spaces_between_special_tokens split_special_tokens "
        "use_fast from_slow keep_accents remove_space return_token_type_ids is_local local_files_only fix_mistral_regex verbose",
    ),
    numbers=(
        _number,
        "model_max_length max_len max_length stride pad_to_multiple_of pad_token_type_id start_n_top end_n_top extra_ids "
        "max_input_chars_per_word",
    ),
    words=(
        _scalar,
        "tokenizer_class processor_class padding_side truncation_side truncation_strategy padding truncation errors backend "
        "tokenizer_type transformers_version",
    ),
    lists=(_list(_word), "model_input_names"),
    texts=(_either(_text, _list(_text)), "never_split chat_control_tokens wordpieces_prefix"),
    tokens=(_TOKENS, "additional_special_tokens extra_special_tokens model_specific_special_tokens"),
    decoder=(_map(lambda key: key.isdecimal() and len(key) < 9, _TOKEN), "added_tokens_decoder"),
    template=(_either(_text, _map(_word, _text), _list(_only(name=_word, template=_text))), "chat_template"),
    sampling=(_either(_null, _only(enable_sampling=_flag, nbest_size=_number, alpha=_number)), "sp_model_kwargs"),
    lain=(_text, "name_or_path _name_or_path special_tokens_map_file"),
    answers=(_either(_text, _object), "response_schema response_template"),
)
_CONFIG_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,80}")
_PRIVATE_NAME = re.compile(r"_[a-z][a-z0-9_]{0,80}")
_TOKEN_NAME = re.compile(r"[a-z0-9_]{1,48}_token")
_SPECIAL = _rules(tokens=(_TOKENS, "additional_special_tokens extra_special_tokens"))


def _vocabulary(model: Any) -> bool:
    """The part `model` of a tokenizer.json: `{token: id}`, or `[[token, score], …]` in the order of the ids."""
    if not isinstance(model, dict) or model.get("type") not in (None, "BPE", "WordPiece", "WordLevel", "Unigram"):
        return False
    vocab = model.get("vocab")
    if isinstance(vocab, list):
        return all(isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], str) and _number(pair[1]) for pair in vocab)
    return isinstance(vocab, dict) and all(map(_number, vocab.values()))


_KEYS: dict[str, dict[str, Rule]] = {
    "config.json": _CONFIG,
    "generation_config.json": _GENERATION,
    "tokenizer_config.json": _TOKENIZER,
    "special_tokens_map.json": _SPECIAL,
    "sentence_bert_config.json": _rules(numbers=(_number, "max_seq_length"), flags=(_flag, "do_lower_case")),
    "config_sentence_transformers.json": _rules(
        versions=(_map(_word, _word), "__version__"),
        prompts=(_map(_text, _text), "prompts"),
        words=(_word, "default_prompt_name similarity_fn_name model_type"),
    ),
    "1_Pooling/config.json": _rules(
        numbers=(_number, "word_embedding_dimension embedding_dimension"),
        flags=(
            _flag,
            "pooling_mode_cls_token pooling_mode_mean_tokens pooling_mode_max_tokens pooling_mode_mean_sqrt_len_tokens "
            "pooling_mode_weightedmean_tokens pooling_mode_lasttoken include_prompt",
        ),
        words=(_word, "pooling_mode"),
    ),
    "tokenizer.json": _rules(
        parts=(_object, "truncation padding normalizer pre_tokenizer post_processor decoder"),
        model=(_vocabulary, "model"),
        version=(_word, "version"),
        added=(_list(_only(id=_number, content=lambda v: isinstance(v, str), **_TOKEN_PARTS)), "added_tokens"),
    ),
    "model.safetensors.index.json": _rules(
        map=(
            _map(_text, lambda name: isinstance(name, str) and re.fullmatch(r"model[\w.-]*\.safetensors", name) is not None),
            "weight_map",
        ),
        metadata=(_map(_word, _scalar), "metadata"),
    ),
}
_SHAPED: dict[str, Rule] = {
    "vocab.json": _map(_text, _number),
    "added_tokens.json": _map(_text, _number),
    "modules.json": _list(
        _only(
            idx=_number,
            name=_word,
            path=lambda path: isinstance(path, str) and re.fullmatch(r"[\w-]{0,40}", path) is not None,
            type=lambda name: isinstance(name, str) and re.fullmatch(r"sentence_transformers(\.\w{1,60}){1,5}", name) is not None,
        )
    ),
}
_LAIN = (
    "_name_or_path", "name_or_path", "special_tokens_map_file", "transformers.js_config", "processor_class",
    "response_schema", "response_template", STRUCTURE,
)  # fmt: skip
"""Keys that say where a model or its file used to be, that are for other programs, or that are made here anew. They are dropped."""

_CODE = ("auto_map", "trust_remote_code", "custom_generate", "custom_pipelines")
_CODE_STARTS = ("_attn_implementation", "attn_implementation", "_experts_implementation", "_commit_hash")
_OPENER_ENDS = ("_file", "_files", "_path", "_dir")
_OPENS = ("init_inputs", "vocab", "merges", "tokenizer_object", "fast_tokenizer_files", "configuration_files")


def read(folder: Path, name: str) -> Any:
    """One JSON file of a model. Raises BadData when it is too large, too deep, contains NaN or Infinity, or is not JSON."""
    path, most = folder / name, MAX_BYTES[name]
    with path.open("rb") as file:
        data = file.read(most + 1)
    if len(data) > most:
        size = f"{most // MIB} MiB" if most >= MIB else f"{most // 1024} KiB"
        raise BadData(
            gettext("%(name)s is larger than %(size)s.", name=name, size=size),
            hint=gettext("Such a file belongs to no model read here."),
            param="path",
        )
    try:
        return json.loads(data, parse_constant=_no_number, parse_float=_finite)
    except (ValueError, RecursionError) as error:
        why = error.args[0] if isinstance(error, _NotFinite) else gettext("it is not JSON (%(error)s)", error=str(error)[:120])
        raise BadData(
            gettext("%(name)s cannot be read: %(why)s.", name=name, why=why),
            hint=gettext("Save the model again with save_pretrained()."),
            param="path",
        ) from None


class _NotFinite(ValueError):
    pass


def _no_number(word: str) -> float:
    raise _NotFinite(gettext("it holds %(word)s, which is no number that a model can have", word=word))


def _finite(word: str) -> float:
    value = float(word)
    return value if math.isfinite(value) else _no_number("Infinity")


def check(name: str, value: Any) -> Any:
    """What the studio keeps of one file. Raises Unsupported for an unknown key, BadData for a value."""
    if name in _SHAPED:
        if not _SHAPED[name](value):
            raise BadData(f"{name} does not hold what such a file holds.", hint="Save the model again.", param="path")
        return value
    if not isinstance(value, dict):
        raise BadData(
            gettext("%(name)s does not hold an object.", name=name), hint=gettext("Use a folder saved by save_pretrained()."), param="path"
        )
    if name != "tokenizer.json":  # whose parts only the tokenizers library reads, which opens and imports nothing
        refuse_code(value, name)
    rules, unknown = _KEYS[name], []
    for key, item in value.items():
        rule = rules.get(key) or _rule_of(name, key)
        if rule is None and (item is not None or key in _OPENS):
            _refuse_opener(name, key)
            unknown.append(key[:60])
        elif rule is not None and not rule(item):
            raise BadData(
                gettext("%(name)s has a value for %(key)s that such a key cannot have.", name=name, key=key[:60]),
                hint=gettext("Save the model again with save_pretrained(), or remove the key."),
                param="path",
            )
    if unknown:
        raise Unsupported(
            gettext("%(name)s has keys that Luthier does not know: %(keys)s.", name=name, keys=", ".join(sorted(unknown)[:8])),
            hint=gettext("Remove keys that do not matter; a key that changes the arithmetic means the architecture is not supported."),
            param="path",
        )
    return {key: item for key, item in value.items() if key not in _LAIN and (item is not None or key in rules or _rule_of(name, key))}


def _rule_of(name: str, key: str) -> Rule | None:
    """The rule for a key that is recognized by its pattern. In config.json any key may stand that names no file: a model is judged
    by what it computes, and its values cannot be paths. One that begins with _ may be a flag or a number, and no name."""
    if name in ("tokenizer_config.json", "special_tokens_map.json") and _TOKEN_NAME.fullmatch(key):
        return _TOKEN
    if name == "generation_config.json" and re.fullmatch(r"[a-z_]{1,40}_token_id", key):
        return _NUMBERS
    if name == "config.json" and _CONFIG_NAME.fullmatch(key) and key not in _OPENS and not key.endswith((*_OPENER_ENDS, "_class")):
        return _any_of_words
    if name == "config.json" and _PRIVATE_NAME.fullmatch(key):  # of OPT: _remove_final_layer_norm
        return _either(_flag, _number)
    return None


def _refuse_opener(name: str, key: str) -> None:
    if key in _OPENS or key.endswith(_OPENER_ENDS):
        raise Unsupported(
            gettext(
                "%(name)s has the key %(key)s, with which a library reads another file than the model's own.", name=name, key=repr(key[:60])
            ),
            hint=gettext(
                "A tokenizer is read from the files of its folder alone. Save it again with save_pretrained(), or remove the key."
            ),
            param="path",
        )


def refuse_code(value: Any, name: str) -> None:
    """Refuse a key, at any depth, that makes a library import code or fetch a kernel. Raises Unsupported."""
    stack = [value]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            for key in item:
                if key in _CODE or key.startswith(_CODE_STARTS):
                    raise Unsupported(
                        gettext(
                            "%(name)s has the key %(key)s, which makes a library load code that came with the model.",
                            name=name,
                            key=repr(key[:60]),
                        ),
                        hint=gettext("Luthier never runs a model's own code. Use a model of a standard architecture, or remove the key."),
                        param="path",
                    )
            stack.extend(item.values())
        elif isinstance(item, list):
            stack.extend(item)
