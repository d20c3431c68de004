"""GGUF files, one per type, from a folder of merged weights: `<name>-<type>.gguf`.

The weights are read, changed and quantized one tensor at a time. Two architectures are not written as they are: Llama's query and key
rows are stored in another order, because llama.cpp rotates neighboring pairs where transformers rotates halves; and Gemma's
norms, which multiply by 1 + w, are stored as 1 + w.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np

from app.errors import BadData, Unsupported
from app.export_formats import FORMATS
from app.export_formats.gguf import ARCHITECTURES
from worker.conversion.rotary import rope_factors, rope_of
from worker.exporters import _gguf_tokenizer as tokenizers
from worker.exporters._base import Exporter, ExportOptions, Progress, WrittenFile, completed
from worker.exporters._gguf_types import FILE_TYPES, PLAIN, Recipe, encode, fallback_notes, nbytes, pieces

LAYER = {
    "input_layernorm": "attn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up", "mlp.down_proj": "ffn_down",
}  # fmt: skip
"""Parts of a layer: the name in transformers → the name in GGUF."""
GEMMA = {
    "post_attention_layernorm": "post_attention_norm", "pre_feedforward_layernorm": "ffn_norm", "post_feedforward_layernorm": "post_ffw_norm",
}  # fmt: skip
WHOLE = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight", "lm_head.weight": "output.weight"}


class GgufExporter(Exporter):
    format = FORMATS["gguf"]

    def write(self, source: Path, into: Path, options: ExportOptions, progress: Progress) -> Sequence[WrittenFile]:
        """One file per type. Raises Unsupported for a model that llama.cpp would compute otherwise, BadData for a folder that lacks weights."""
        progress(0.0, "Reading the tokenizer")
        model = MergedFolder(source)
        written = []
        for place, name in enumerate(options.types):

            def share(done: float, place: int = place, name: str = name) -> None:
                progress((place + done) / len(options.types), f"Writing {name}")

            path = into / f"{file_name(options.name)}-{name}.gguf"
            if not path.is_file():
                with completed(path) as part:
                    model.write(part, name, options, share)
            written.append(WrittenFile(path.name, name, model.notes(name, options)))
        return written


EXPORTER = GgufExporter()


def file_name(model: str) -> str:
    """A model's name as part of a file's name."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", model).strip("-.") or "model"


class GgufTensor(NamedTuple):
    """One tensor of the file: its name there, its name in the folder, and its shape (rows, width) or (width,)."""

    name: str
    source: str
    shape: tuple[int, ...]


class MergedFolder:
    """A folder of merged weights, read as llama.cpp will see it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        self.architecture = ARCHITECTURES.get(self.config["model_type"], "")
        check_config(self.config)
        self.tied = bool(self.config.get("tie_word_embeddings", self.architecture == "gemma3"))
        self.files = weight_files(folder)
        self.tensors = self._tensors()
        embedding = next(t for t in self.tensors if t.name == "token_embd.weight")
        self.vocabulary = tokenizers.read(folder, embedding.shape[0])

    # What is written --------------------------------------------------------------------------------------------------

    def _tensors(self) -> list[GgufTensor]:
        """Every tensor of the file, in the order of the layers. Raises Unsupported for one that llama.cpp has no place for, and
        BadData where one is missing."""
        from safetensors import safe_open

        found = []
        for name, path in self.files.items():
            if name == "lm_head.weight" and self.tied:
                continue
            with safe_open(path, framework="pt") as opened:
                found.append(GgufTensor(self._name(name), name, tuple(opened.get_slice(name).get_shape())))
        here = {tensor.name for tensor in found}
        if missing := sorted(self._needed() - here):
            raise BadData(f"The weights lack {len(missing)} tensors, the first {missing[0]}.", hint="Add the model again.")
        return sorted(found, key=lambda t: (t.name.startswith("blk."), _layer(t.name), t.name))

    def _name(self, name: str) -> str:
        if name in WHOLE:
            return WHOLE[name]
        match = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
        parts = {**LAYER, **GEMMA} if self.architecture == "gemma3" else LAYER
        if match is None or match[2] not in parts:
            raise Unsupported(f"llama.cpp has no place for the tensor {name[:80]}.", hint="Download the merged model instead.")
        return f"blk.{match[1]}.{parts[match[2]]}.{match[3]}"

    def _needed(self) -> set[str]:
        parts = set(LAYER.values()) - {"attn_q_norm", "attn_k_norm"}
        if self.architecture in ("gemma3", "qwen3"):
            parts |= {"attn_q_norm", "attn_k_norm"}
        if self.architecture == "gemma3":
            parts |= set(GEMMA.values())
        layers = {f"blk.{n}.{part}.weight" for n in range(self.config["num_hidden_layers"]) for part in parts}
        return layers | {"token_embd.weight", "output_norm.weight"} | (set() if self.tied else {"output.weight"})

    # The file ---------------------------------------------------------------------------------------------------------

    def write(self, path: Path, kind: str, options: ExportOptions, share: Callable[[float], None]) -> None:
        """Write one file."""
        chosen = self._chosen(kind)
        importance = np.load(options.importance) if self._is_weighted(kind, options) else {}
        writer = gguf.GGUFWriter(path, self.architecture)
        self._keys(writer, kind, options)
        extra = rope_factors(self.config)
        if extra is not None:
            writer.add_tensor_info("rope_freqs.weight", list(extra.shape), np.dtype(np.float32), extra.nbytes)
        for tensor in self.tensors:
            stored = chosen[tensor.name][0]
            size = nbytes(stored, tensor.shape)
            dtype = {"F32": np.float32, "F16": np.float16}.get(stored.name)
            if dtype is not None:
                writer.add_tensor_info(tensor.name, list(tensor.shape), np.dtype(dtype), size)
            else:
                rows = [*tensor.shape[:-1], size // math.prod(tensor.shape[:-1])]
                writer.add_tensor_info(tensor.name, rows, np.dtype(np.uint8), size, raw_dtype=stored)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        if extra is not None:
            writer.write_tensor_data(extra)
        total, done = sum(math.prod(t.shape) for t in self.tensors), 0
        for tensor in self.tensors:
            columns = importance.get(tensor.source)
            writer.write_tensor_data(encode(self._rows(tensor), chosen[tensor.name][0], tensor.shape, columns))
            done += math.prod(tensor.shape)
            share(done / total)
        writer.close()

    def notes(self, kind: str, options: ExportOptions) -> tuple[str, ...]:
        """Where a file differs from what its type promises."""
        found = fallback_notes(self._chosen(kind), {t.name: t.shape[-1] for t in self.tensors})
        return (*found, "Quantized with an importance matrix of the training rows.") if self._is_weighted(kind, options) else found

    def _chosen(self, kind: str) -> dict[str, tuple[gguf.GGMLQuantizationType, gguf.GGMLQuantizationType]]:
        """Tensor → (its type, its type by the recipe)."""
        c = self.config
        heads, kv = c["num_attention_heads"], c.get("num_key_value_heads") or c["num_attention_heads"]
        recipe = Recipe(kind, c["num_hidden_layers"], heads // kv, "token_embd.weight" if self.tied else "output.weight")
        return {t.name: recipe.type_of(t.name, t.shape) for t in self.tensors}

    @staticmethod
    def _is_weighted(kind: str, options: ExportOptions) -> bool:
        return bool(options.importance) and kind in FORMATS["gguf"].weighted

    def _rows(self, tensor: GgufTensor) -> Iterator[np.ndarray]:
        """The tensor in pieces of whole rows, float32, as llama.cpp wants its numbers."""
        import torch
        from safetensors import safe_open

        with safe_open(self.files[tensor.source], framework="pt") as opened:
            stored = opened.get_slice(tensor.source)
            heads = self._heads(tensor)
            if len(tensor.shape) == 1 or heads:
                whole = stored[:].to(torch.float32).numpy()
                whole = permuted(whole, heads) if heads else whole
                yield whole + 1.0 if self.architecture == "gemma3" and tensor.name.endswith("norm.weight") else whole
                return
            for rows in pieces(*tensor.shape):
                yield stored[rows].to(torch.float32).numpy()

    def _heads(self, tensor: GgufTensor) -> int:
        """Heads whose rows change places; 0 for a tensor that is written in its own order."""
        part = tensor.name.split(".")[-2]
        if self.architecture != "llama" or part not in ("attn_q", "attn_k"):
            return 0
        heads = self.config["num_attention_heads"]
        return heads if part == "attn_q" else self.config.get("num_key_value_heads") or heads

    def _keys(self, writer: gguf.GGUFWriter, kind: str, options: ExportOptions) -> None:
        c, words = self.config, self.vocabulary
        heads, head_dim = c["num_attention_heads"], c.get("head_dim") or c["hidden_size"] // c["num_attention_heads"]
        writer.add_type("model")
        writer.add_name(options.title or options.name)
        if options.license:
            writer.add_license(options.license)
        writer.add_file_type(FILE_TYPES[kind].number)
        if FILE_TYPES[kind].base not in PLAIN:
            writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_block_count(c["num_hidden_layers"])
        writer.add_context_length(c["max_position_embeddings"])
        writer.add_embedding_length(c["hidden_size"])
        writer.add_feed_forward_length(c["intermediate_size"])
        writer.add_head_count(heads)
        writer.add_head_count_kv(c.get("num_key_value_heads") or heads)
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_layer_norm_rms_eps(c["rms_norm_eps"])
        writer.add_vocab_size(len(words.tokens))
        writer.add_rope_freq_base(rope_of(c)["rope_theta"])
        if self.architecture == "gemma3":
            writer.add_sliding_window(c["sliding_window"])
        else:
            writer.add_rope_dimension_count(head_dim)
        self._tokenizer_keys(writer)

    def _tokenizer_keys(self, writer: gguf.GGUFWriter) -> None:
        words = self.vocabulary
        writer.add_tokenizer_model(words.model)
        if words.pre:
            writer.add_tokenizer_pre(words.pre)
        writer.add_token_list(words.tokens)
        writer.add_token_types(words.types)
        if words.merges is not None:
            writer.add_token_merges(words.merges)
        if words.scores is not None:
            writer.add_token_scores(words.scores)
            writer.add_add_space_prefix(False)
        for name, i in words.ids.items():
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", i)
        writer.add_add_bos_token(words.add_bos)
        writer.add_add_eos_token(False)
        if words.template:
            writer.add_chat_template(words.template)


def _layer(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else 0


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor → the safetensors file it is in. Raises BadData where there is none."""
    from safetensors import safe_open

    found: dict[str, Path] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as opened:
            found |= dict.fromkeys(opened.keys(), path)
    if not found:
        raise BadData("The folder holds no weights.", hint="Add the model again.")
    return found


def permuted(weights: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, (heads · head_dim, …), in the order of llama.cpp's rotary embedding: the i-th of the first half
    of a head next to the i-th of its second half (`LlamaModel.permute` of its converter)."""
    return weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:]).swapaxes(1, 2).reshape(weights.shape)


# The config -----------------------------------------------------------------------------------------------------------


def check_config(config: dict[str, Any]) -> None:
    """Raises Unsupported for anything that llama.cpp would compute in another way."""
    kind = config["model_type"]
    if kind not in ARCHITECTURES:
        raise _refused(f"its architecture, {kind}, is not written here")
    rope, gemma = rope_of(config), kind == "gemma3_text"
    if rope["rope_type"] not in (("default",) if gemma else ("default", "llama3")):
        raise _refused(f"its rotary embedding is of the type {rope['rope_type']}")
    act = "gelu_pytorch_tanh" if gemma else "silu"
    if (found := config.get("hidden_activation" if gemma else "hidden_act", act)) != act:
        raise _refused(f"its activation is {found}, and llama.cpp's is {act}")
    if (kind in ("llama", "mistral", "qwen3") and config.get("attention_bias")) or config.get("mlp_bias"):
        raise _refused("its layers have biases")
    if (kind == "mistral" and config.get("sliding_window")) or (kind.startswith("qwen") and config.get("use_sliding_window")):
        raise _refused("its layers see a sliding window")
    if gemma:
        _check_gemma(config)


def _check_gemma(c: dict[str, Any]) -> None:
    """llama.cpp has the attention pattern, its local rotary base and the scale of the queries of a Gemma 3 built in."""
    layers = c.get("layer_types") or []
    if layers != ["full_attention" if n % 6 == 5 else "sliding_attention" for n in range(c["num_hidden_layers"])]:
        raise _refused("its layers do not alternate as five with a sliding window and one without")
    if c.get("query_pre_attn_scalar", c["head_dim"]) != c["head_dim"]:
        raise _refused(f"its queries are scaled by {c['query_pre_attn_scalar']} and not by the width of a head")
    if c.get("attn_logit_softcapping") or c.get("final_logit_softcapping"):
        raise _refused("its logits are capped")
    local = ((c.get("rope_parameters") or {}).get("sliding_attention") or {}).get("rope_theta", c.get("rope_local_base_freq", 10_000.0))
    if local != 10_000.0:
        raise _refused(f"the rotary base of its local layers is {local:g} and not 10,000")


def _refused(why: str) -> Unsupported:
    return Unsupported(f"This model cannot be written as GGUF: {why}.", hint="Download the merged model, or choose another format.")
