"""The versions that a result was made with: written into every editor, patch and report."""

from __future__ import annotations

import platform
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version

import ie

__all__ = ["now", "versions"]

_PACKAGES = ("torch", "transformers", "safetensors", "bitsandbytes")


def versions() -> dict[str, str]:
    """Version of `ie`, Python and the packages that figures depend on."""
    found = {"ie": ie.__version__, "python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def now() -> str:
    """The time in UTC, ISO 8601, to the second."""
    return datetime.now(UTC).replace(microsecond=0).isoformat()
