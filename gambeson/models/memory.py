"""Lacks of memory, told apart from other errors and said so that a person can mend them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gambeson.errors import EnvironmentFault

_SIGNS = ("out of memory", "can't allocate memory", "failed to allocate memory", "alloc_failed", "bad_alloc")
"""What torch, CUDA's libraries and onnxruntime say, in small letters."""


def lacks_memory(error: BaseException) -> bool:
    """Whether an error is a lack of memory, of the machine's or of an accelerator's."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    said = isinstance(error, Exception) and not isinstance(error, (OSError, ValueError))  # those are told as they are
    return said and any(sign in str(error).lower() for sign in _SIGNS)


@contextmanager
def memory_told(fix: str) -> Iterator[None]:
    """Inside, a lack of memory becomes an EnvironmentFault that says what usually helps; other errors stay."""
    try:
        yield
    except Exception as error:
        if not lacks_memory(error):
            raise
        told = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise EnvironmentFault(f"expected enough memory, got: {told}. {fix}") from error
