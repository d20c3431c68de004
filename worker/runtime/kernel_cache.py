"""Where compiled kernels of the CPU are kept."""

from __future__ import annotations

import hashlib
import os
import tempfile
from pathlib import Path

from app.settings import PROJECT, Settings

MADE_OF = (
    "jit.py", "amx.py", "rms_norm.py", "gated_mlp.py", "rotary.py", "cross_entropy.py", "attention.py", "lora_products.py", "adamw.py",
    "lora_step.py",
)  # fmt: skip
"""Files in which kernels, or what they are written with, stand."""


def folder() -> Path:
    """Where compiled kernels are kept, made when missing. A file of kernels that has changed, or what they are made of, has another
    folder, so that `begin` sees that something is to be compiled."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    found = Path(given) if given else Settings().data_dir.expanduser() / "cache" / "numba"
    try:
        found.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        found = Path(tempfile.mkdtemp(prefix="luthier-"))  # compiled again by every process
    made_of = b"".join((PROJECT / "worker" / "kernels" / "cpu" / name).read_bytes() for name in MADE_OF)
    return found / hashlib.sha256(made_of).hexdigest()[:12]
