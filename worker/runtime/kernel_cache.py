"""The cache folder of compiled CPU kernels."""

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
"""Source files of kernels, and of the tools they are written with."""


def folder() -> Path:
    """The cache folder, created when missing. Its name is a hash of the kernels' sources, so that `warmup.begin`
    notices when there is something to compile."""
    given = os.environ.get("NUMBA_CACHE_DIR")
    found = Path(given) if given else Settings().data_dir.expanduser() / "cache" / "numba"
    try:
        found.mkdir(parents=True, exist_ok=True, mode=0o700)
    except OSError:
        found = Path(tempfile.mkdtemp(prefix="luthier-"))  # every process compiles again
    made_of = b"".join((PROJECT / "worker" / "kernels" / "cpu" / name).read_bytes() for name in MADE_OF)
    return found / hashlib.sha256(made_of).hexdigest()[:12]
