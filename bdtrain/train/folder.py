"""The run's folder: made once, never written over."""

from __future__ import annotations

from pathlib import Path

from bdtrain.config import RunConfig, dump_resolved
from bdtrain.errors import ConfigError

RESOLVED = "config.yaml"


def check_run_folder(folder: Path) -> None:
    """Refuse a folder that holds anything already: a run never writes over another.

    Raises:
        ConfigError: if it does, or is a file.
    """
    try:
        taken = folder.exists() and any(folder.iterdir())
    except NotADirectoryError as error:
        raise ConfigError(f"run.folder={folder} is a file; choose another folder") from error
    if taken:
        raise ConfigError(
            f"run.folder={folder} holds another run; choose another with "
            "run.name=... or run.folder=..., or remove it"
        )


def claim_run_folder(config: RunConfig) -> Path:
    """Make the folder of a run and write the resolved configuration into it.

    Raises:
        ConfigError: if the folder holds anything already.
    """
    folder = Path(config.run.folder)
    check_run_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / RESOLVED).write_text(dump_resolved(config), encoding="utf-8")
    return folder
