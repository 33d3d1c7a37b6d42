"""The one error tree of `ie`. Every error says what failed, which value, and what was expected.

    IEError                   exit 1   anything that went wrong
    ├── InputError            exit 2   a bad flag, file, dataset, template, editor or patch
    │   ├── DataError                  records, datasets and published files
    │   ├── TemplateError              instruction templates
    │   ├── ModelError                 a folder or hub id that is no usable base model
    │   ├── EditorError                an editor folder that cannot be used
    │   └── PatchError                 a patch file that cannot be used
    ├── NotEnoughMemoryError           the machine or the GPU has too little memory
    ├── EditFailedError       exit 3   the edit did not take
    └── BaseMismatchError     exit 4   the base model is not the one an editor or patch was made for

A command turns any of them into `error: ...`, `hint: ...` and the exit code.
"""

from __future__ import annotations

__all__ = [
    "BaseMismatchError",
    "DataError",
    "EditFailedError",
    "EditorError",
    "IEError",
    "InputError",
    "ModelError",
    "NotEnoughMemoryError",
    "PatchError",
    "TemplateError",
    "is_out_of_memory",
]


class IEError(Exception):
    """Anything that `ie` reports to its user.

    Args:
        message: what failed, which value, what was expected.
        hint: what the user can do about it.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class InputError(IEError):
    """A flag or an input file that cannot be used."""

    exit_code = 2


class DataError(InputError):
    """A record, a dataset or a published file that cannot be read."""


class TemplateError(InputError):
    """An instruction template that cannot be loaded or filled."""


class ModelError(InputError):
    """A folder or hub id that holds no usable base model."""


class EditorError(InputError):
    """An editor folder that cannot be used."""


class PatchError(InputError):
    """A patch file that cannot be used."""


class NotEnoughMemoryError(IEError):
    """The machine or the GPU has too little memory."""


class EditFailedError(IEError):
    """The edited model does not answer with the target."""

    exit_code = 3


class BaseMismatchError(IEError):
    """The base model is not the one that the editor or the patch was made for."""

    exit_code = 4


def is_out_of_memory(error: BaseException) -> bool:
    """Whether memory ran out: on a GPU torch has a type for it, its CPU allocator only a text; no torch is loaded."""
    return isinstance(error, MemoryError) or any(
        sign in f"{type(error).__name__}: {error}"
        for sign in ("OutOfMemoryError", "DefaultCPUAllocator", "Cannot allocate memory", "std::bad_alloc")
    )
