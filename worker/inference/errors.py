"""Errors of a request as entries of its stream."""

from __future__ import annotations

import torch

from app.errors import StudioError
from app.inference.protocol import StreamError


class NotANumber(StudioError):
    code = "not_a_number"


def broke(error: BaseException) -> StreamError:
    """The entry that ends a stream. The text of an unexpected exception is not shown in full: it may hold paths."""
    if isinstance(error, StudioError):
        return StreamError(
            status=error.status, code=error.code, error_type=error.type, message=error.message, hint=error.hint, param=error.param
        )
    if isinstance(error, torch.OutOfMemoryError | MemoryError) or "alloc" in str(error):
        return StreamError(
            status=503, code="out_of_memory", message="The machine ran out of memory.", hint="Shorten the prompt or try again."
        )
    return StreamError(status=500, code="internal_error", message=f"The model failed while answering ({type(error).__name__}).")
