"""What all lists share: how a model is named where it is chosen."""

from __future__ import annotations

from app.tables import Model


def option_text(model: Model, title: str = "") -> str:
    """What tells a model apart in a list to choose from: `chats with LoRA · SmolLM2 135M · 2026-11-29 10:04 UTC`. A base has its title alone.

    `title` is what it is called there, where that is not its own title."""
    title, base = title or model.title, model
    while base.base is not None:
        base = base.base
    return title if base is model else f"{title} · {base.title} · {model.created_at:%Y-%m-%d %H:%M} UTC"
