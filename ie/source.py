"""Where a base model is: the bundled one, a folder, or a hub's repository. No torch, no network."""

from __future__ import annotations

from pathlib import Path

from ie.errors import ModelError

__all__ = ["TOY_FOLDER", "local_folder"]

TOY_FOLDER = Path(__file__).parent / "base" / "toy_base"


def local_folder(name: str) -> Path | None:
    """The folder that a base model's name stands for, `~` expanded; None for a hub id, `owner/name`.

    Raises:
        ModelError: if it can be neither.
    """
    if name == "toy":
        return TOY_FOLDER
    folder = Path(name).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise ModelError(
                f"{name} is no model folder: it has no config.json",
                hint="point --model at a folder saved by save_pretrained()",
            )
        return folder
    if folder.exists() or name.startswith((".", "/", "~")) or [bool(part) for part in name.split("/")] != [True, True]:
        raise ModelError(
            f"no base model at {name!r}: neither a folder nor a hub id",
            hint="expected `toy`, a folder saved by save_pretrained(), or a hub id such as owner/name",
        )
    return None
