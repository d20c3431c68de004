"""Which class of transformers a model is made by, and the widths in its config."""

from __future__ import annotations

from typing import Any

from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSeq2SeqLM
from transformers.models.auto.modeling_auto import MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES as WITH_ENCODER

from app.shapes import Shape


def maker_of(shape: Shape) -> Any:
    """The class for a model of this shape: with its output layer, or of an encoder without one."""
    if shape.architecture == "encoder":
        return AutoModel
    return AutoModelForSeq2SeqLM if shape.encodes else AutoModelForCausalLM


def maker_for(config: Any, *, encoder: bool) -> Any:
    """The same for a config of transformers, before its shape is known."""
    if encoder:
        return AutoModel
    return AutoModelForSeq2SeqLM if config.is_encoder_decoder and config.model_type in WITH_ENCODER else AutoModelForCausalLM


def width_of(config: Any, name: str) -> int | None:
    """A whole number above zero of a config: the largest one, where its layers have values of their own."""
    apart = name in (getattr(config, "per_layer_attributes", None) or ())
    values = [getattr(layer, name, None) for layer in config.per_layer_config] if apart else [getattr(config, name, None)]
    return max((value for value in values if isinstance(value, int) and value > 0), default=None)
