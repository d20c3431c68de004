"""Which class of transformers a model is made by."""

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
