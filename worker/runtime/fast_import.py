"""Imports torch and transformers with the garbage collector off. The import creates a million objects that live as long as the
process, and scanning them again and again, then and later, takes a third of the time."""

from __future__ import annotations

import contextlib
import gc
import sys
from collections.abc import Iterator


@contextlib.contextmanager
def importing() -> Iterator[None]:
    """Within this context there is no garbage collection, and objects created in it are exempt from later ones. No effect where
    torch is imported already."""
    if "torch" in sys.modules:
        yield
        return
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
