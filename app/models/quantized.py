"""Checkpoints with 8-bit weights that can be added: their weights are written out in bf16 on import (`worker/conversion/dequantize.py`).

A scheme is read from `quantization_config` of config.json. Each weight of 8 bits has a scale beside it, by its name; the weight is the
number times its scale. What packs several weights into one number, rotates them or looks them up needs kernels of its own, and is refused.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from app.errors import Unsupported
from app.languages import gettext

BITS = 8


class Scheme(NamedTuple):
    """How 8-bit weights are stored. The scale of the weight NAME is called NAME without `cut`, and `scale` behind it."""

    title: str  # as a page says it
    scale: str
    cut: str = ""
    divisor: float = 1.0  # of the scale
    block: tuple[int, int] | None = None  # rows and columns with one scale; None: the sizes of the scale say so
    zero_point: str = ""  # suffix of what is subtracted first, where there is one
    dropped: tuple[str, ...] = ()  # ends of names of tensors that only quantized activations need
    formats: str = ""  # end of the name of a tensor that has to be 0, the layout by rows

    def scale_of(self, weight: str) -> str:
        return weight.removesuffix(self.cut) + self.scale


def scheme_of(config: Any) -> Scheme:
    """The scheme that a `quantization_config` names. Raises Unsupported for any other, with the reason."""
    if not isinstance(config, dict):
        raise _refused(gettext("quantization_config of config.json is not an object"))
    method = str(config.get("quant_method") or ("bitsandbytes" if "load_in_8bit" in config else ""))[:40]
    if not method:
        raise _refused(gettext("the weights are quantized by an unnamed method"))
    if method not in _SCHEMES:
        raise _refused(gettext("the weights are quantized by %(method)s", method=method))
    return _SCHEMES[method](config)


def _fp8(config: dict[str, Any]) -> Scheme:
    """transformers' FineGrainedFP8Config, the format of DeepSeek-V3 and Qwen3-FP8."""
    block = config.get("weight_block_size")
    if config.get("expert_dtype", "fp8") != "fp8" or str(config.get("scale_fmt") or "float") not in ("float", "ue8m0"):
        raise _refused(gettext("the weights are quantized by fp8 with experts of 4 bits, or scales of another kind"))
    if block is not None and not (isinstance(block, list) and len(block) == 2 and all(type(n) is int and 0 < n <= 65_536 for n in block)):
        raise _refused(gettext("the weights are quantized by fp8, and weight_block_size is not two numbers"))
    blocks = f"blocks of {block[0]} × {block[1]}" if block else "whole tensors"
    return Scheme(
        f"fp8, {blocks}", "_scale_inv", block=(block[0], block[1]) if block else None, dropped=("activation_scale", "input_scale")
    )


def _bitsandbytes(config: dict[str, Any]) -> Scheme:
    """LLM.int8() (Dettmers et al. 2022, https://arxiv.org/abs/2208.07339): rows of int8 with their largest absolute value."""
    if config.get("load_in_4bit") or not config.get("load_in_8bit"):
        raise _refused(gettext("the weights are quantized by bitsandbytes in 4 bits"))
    return Scheme("int8 of bitsandbytes", "SCB", cut="weight", divisor=127.0, formats="weight_format")


def _compressed_tensors(config: dict[str, Any]) -> Scheme:
    kind = str(config.get("format"))[:40]
    named = config.get("config_groups")
    weights = [group.get("weights") for group in named.values() if isinstance(group, dict)] if isinstance(named, dict) else []
    bits = {one.get("num_bits") if isinstance(one, dict) else None for one in weights}
    sparse = config.get("sparsity_config")
    dense = not sparse or (isinstance(sparse, dict) and sparse.get("format", "dense") == "dense")
    if kind not in ("float-quantized", "int-quantized", "naive-quantized") or bits != {BITS} or not dense:
        raise _refused(gettext("the weights are quantized by compressed-tensors as %(kind)s, or not in 8 bits", kind=kind))
    further = tuple(f"{of}_{what}" for of in ("input", "output", "k", "v", "q") for what in ("scale", "zero_point"))
    return Scheme(f"{kind} of compressed-tensors", "_scale", zero_point="_zero_point", dropped=further)


_SCHEMES = {"fp8": _fp8, "bitsandbytes": _bitsandbytes, "compressed-tensors": _compressed_tensors}


def _refused(why: str) -> Unsupported:
    return Unsupported(
        gettext("This model cannot be read: %(why)s.", why=why),
        hint=gettext(
            "Use its unquantized version (16 or 32 bit safetensors), or one in fp8, int8 of bitsandbytes, or 8 bits of compressed-tensors."
        ),
        param="path",
    )
