"""The first import of torch and transformers, done sooner. It makes a million objects that stay as long as the process, and
Python would look through them for garbage again and again, then and later: a third of the time."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """No looking for garbage in here, and what is made here is never looked through. Nothing where torch is imported already."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
