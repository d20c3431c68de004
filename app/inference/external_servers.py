"""Which server answers for which model: an external engine replaces ours for a model, and nothing else changes.

A plain LoRA adapter of a model on an external server is loaded there by vLLM's `/v1/load_lora_adapter`; what a server does not
support (other adapters, blends, checkpoints of whole models) our own engine answers. The client is
`app/inference/external_server.py`.
"""

from __future__ import annotations

import functools
import json

from sqlalchemy.orm import Session

from app.errors import BadField, Conflict
from app.export_formats.gguf import ARCHITECTURES
from app.inference import llama_cpp
from app.inference.external_server import find, names
from app.inference.protocol import LLAMA_CPP, ExternalEngine
from app.languages import gettext
from app.models.service import Resolved
from app.models.vocabulary import has_new_tokens
from app.shapes import Shape
from app.spec import SILENT
from app.storage import places
from app.tables import JSON, Model


def register(model: Model, url: str, name: str, via: str = "tokens") -> ExternalEngine:
    """Let a server answer for a model from now on. Raises BadField when it does not serve that name, Unavailable when it is unreachable."""
    if url.strip() == LLAMA_CPP:
        return _register_llama_cpp(model, name)
    address = find(url)
    if via not in ("tokens", "chat"):
        raise BadField(
            gettext("%(via)s is no way to send a prompt.", via=repr(via[:20])), hint=gettext("There are tokens and chat."), param="via"
        )
    if model.kind in SILENT:
        raise BadField(gettext("%(model)s does not write text, so no engine can answer for it.", model=model.name), param="model")
    served = names(address)
    if name not in served:
        raise BadField(
            gettext("%(engine)s serves no model %(name)s.", engine=address.host, name=repr(name[:120])),
            hint=gettext("It serves %(models)s.", models=", ".join(served[:8])) if served else gettext("It serves nothing."),
            param="engine_model",
        )
    engine = ExternalEngine(url=address.url, model=name, via=via)
    model.engine = engine.model_dump(mode="json", exclude={"adapter"})
    return engine


def _register_llama_cpp(model: Model, kind: str) -> ExternalEngine:
    """Let llama.cpp answer for a model in a GGUF type. A fine-tuned model that is an adapter is answered as its base is."""
    engine = llama_cpp.engine(kind)
    if model.adapter:
        raise BadField(
            gettext("%(model)s is an adapter: it is answered as its base model is.", model=model.name),
            hint=gettext("Choose llama.cpp for the base model."),
            param="model",
        )
    if not llama_cpp.runs(model.kind, Shape.model_validate(model.shape)):
        raise BadField(
            gettext("llama.cpp cannot run %(model)s.", model=model.name),
            hint=gettext("It runs %(names)s.", names=", ".join(ARCHITECTURES)),
            param="model",
        )
    model.engine = engine.model_dump(mode="json", exclude={"adapter"})
    return engine


def llama_types(model: Model) -> tuple[str, ...]:
    """The GGUF types in which llama.cpp can answer for a model, the usual one first; none where it cannot."""
    if model.adapter or model.shape is None or not llama_cpp.runs(model.kind, Shape.model_validate(model.shape)):
        return ()
    return (llama_cpp.DEFAULT_TYPE, *(kind for kind in llama_cpp.TYPES if kind != llama_cpp.DEFAULT_TYPE))


def remove(model: Model) -> None:
    """Return to our own engine. Raises Conflict for a model that has no other."""
    if model.engine is None:
        raise Conflict(gettext("%(model)s is answered by the studio's own engine already.", model=model.name), param="model")
    model.engine = None


def engine_of(session: Session, found: Resolved) -> ExternalEngine | None:
    """The model's own external engine if it has one, else that of its base where the server can load the adapter. None is our own
    engine."""
    adapters = found.ref.adapters
    if any(adapter.blend != 1 for adapter in adapters):
        return None
    if found.checkpoint is None and found.model.answered_elsewhere:
        return ExternalEngine.model_validate(found.model.engine)
    base = found.model
    while base.adapter and base.base_id is not None:
        base = session.get_one(Model, base.base_id)
    if base.path != found.ref.path or len(adapters) > 1 or (adapters and not _plain_lora(adapters[0].path)):
        return None
    if not base.answered_elsewhere:
        kind = base.engine["model"] if base.engine else llama_cpp.by_setting()
        return (
            llama_cpp.engine(kind, adapters[0].path if adapters else None)
            if kind and llama_cpp.runs(found.ref.kind, found.ref.shape)
            else None
        )
    if not adapters:
        return None
    served = ExternalEngine.model_validate(base.engine)
    return served.model_copy(update={"model": f"luthier-{adapters[0].sha256[:32]}", "adapter": adapters[0].path})


@functools.lru_cache(maxsize=512)
def _plain_lora(path: str) -> bool:
    """Whether a folder holds plain LoRA without new tokens, all that servers support in addition to a base. Cached, because it is never changed in place."""
    if has_new_tokens(path):
        return False
    try:
        config = json.loads((places.path(path, weights=False) / "adapter_config.json").read_text())
    except (OSError, ValueError):
        return False
    extras = ("use_dora", "modules_to_save", "trainable_token_indices", "lora_bias", "alpha_pattern", "rank_pattern", "layer_replication")
    return config.get("peft_type") == "LORA" and config.get("bias", "none") == "none" and not any(config.get(x) for x in extras)


def to_json(model: Model) -> JSON | None:
    return None if model.engine is None else {"url": model.engine["url"], "model": model.engine["model"], "via": model.engine["via"]}
