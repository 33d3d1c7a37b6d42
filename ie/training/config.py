"""Configurations of training: YAML files whose keys are the flags' names; ready ones come with the package.

Nothing here loads torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from ie.data.dataset import did_you_mean
from ie.errors import InputError
from ie.training.settings import TrainSettings

__all__ = ["CONFIG", "config_text", "find_config", "read_config", "ready_configs"]

CONFIG = "config.yaml"
_OF_ONE_CALL = {"force", "resume"}  # what belongs to a command and not to a run


def ready_configs() -> dict[str, Path]:
    """The configurations that come with the package, by name."""
    folder = Path(__file__).parent / "configs"
    return {path.stem: path for path in sorted(folder.glob("*.yaml"))}


def find_config(name: str) -> Path:
    """A configuration's file: the file named, or the ready configuration of this name.

    Raises:
        InputError: if there is neither.
    """
    ready = ready_configs()
    if name in ready and not Path(name).is_file():
        return ready[name]
    if not Path(name).is_file():
        raise InputError(
            f"--config {name}: no such file, and no ready configuration of this name",
            hint=f"{did_you_mean(name, ready)}ready are {', '.join(ready)}",
        )
    return Path(name)


def read_config(path: Path) -> dict[str, Any]:
    """The settings that a configuration names.

    Raises:
        InputError: if it cannot be read, or has keys that are no setting; all of them at once.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except OSError as error:
        raise InputError(f"--config {path}: cannot be read: {error.strerror or error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise InputError(f"--config {path}: no YAML: {' '.join(str(error).split())}") from error
    if not isinstance(values, dict):
        raise InputError(f"--config {path}: expected a mapping of flags to values")
    values = {str(key).replace("-", "_"): value for key, value in values.items()}
    known = set(TrainSettings.model_fields) - _OF_ONE_CALL
    unknown = [key for key in values if key not in known]
    if unknown:
        near = " ".join(hint for key in unknown if (hint := did_you_mean(key, sorted(known)).strip()))
        raise InputError(
            f"--config {path}: unknown keys: {', '.join(unknown)}",
            hint=near or f"known are {', '.join(sorted(known))}",
        )
    return values


def config_text(settings: TrainSettings, note: Mapping[str, str]) -> str:
    """A run's settings as a configuration, with comments above them."""
    head = "".join(f"# {name}: {value}\n" for name, value in note.items())
    return head + yaml.safe_dump(settings.model_dump(mode="json", exclude=_OF_ONE_CALL), sort_keys=False)
