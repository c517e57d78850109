"""Ship a run's metrics to MLflow after the fact: what a dead server or a missing network left behind.

    python tools/mlflow_sync.py runs/my-run
    python tools/mlflow_sync.py runs/my-run --uri http://127.0.0.1:5000

Everything comes from ``metrics.jsonl``; what the store has already is not sent again. Credentials belong into
``MLFLOW_TRACKING_USERNAME`` and ``MLFLOW_TRACKING_PASSWORD`` or ``MLFLOW_TRACKING_TOKEN``.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import yaml

from bdtrain.config import RunConfig
from bdtrain.errors import BdtrainError, ConfigError, report_failure
from bdtrain.tracking.mlflow import (
    StoreOptions,
    default_uri,
    quiet_environment,
    read_run_uid,
)
from bdtrain.tracking.names import run_name
from bdtrain.tracking.run_files import CONFIG_FILE, METRICS_FILE
from bdtrain.tracking.ship import SHIPPED, Shipping, only_shipper, open_store
from bdtrain.tracking.spool import RedactedStream, lines_left, redact


def main(arguments: list[str]) -> int:
    """Ship a run.

    Returns:
        0 if everything is in the store, 1 if not.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--uri", help="of the store (default: as the run's configuration says)")
    options = parser.parse_args(arguments)
    sys.stdout, sys.stderr = RedactedStream(sys.stdout), RedactedStream(sys.stderr)
    try:
        return ship_run(options.folder, options.uri)
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error)


def ship_run(folder: Path, uri: str | None) -> int:
    """Ship what a run's metrics file holds and the store does not.

    Args:
        folder: of the run.
        uri: of the store; None: that of the run's configuration.

    Returns:
        0 if everything is in the store, 1 if not.

    Raises:
        ConfigError: if the folder holds no run, or another process ships it.
    """
    if not (folder / METRICS_FILE).is_file():
        raise ConfigError(f"{folder} has no {METRICS_FILE}; give the folder of a run")
    config = _read_config(folder / CONFIG_FILE)
    tracking = config.get("tracking") or {}
    uri = uri or tracking.get("mlflow_uri") or default_uri(folder)
    experiment = tracking.get("experiment") or "bdtrain"
    store = StoreOptions(uri, experiment, name_of_run(folder, config), read_run_uid(folder))
    os.environ.update(quiet_environment())
    try:
        with only_shipper(folder, uri, wait=lambda: False):
            before = lines_left(folder, uri)
            shipping = Shipping(
                folder,
                uri,
                lambda run_id: open_store(folder, store, run_id),
                attempt=None,
                parent_alive=lambda: False,
                say=print,
            )
            code = shipping.run()
    except BlockingIOError as error:
        raise ConfigError(
            f"another process ships {folder}: its trainer's, or another of these; wait for its end"
        ) from error
    left = lines_left(folder, uri)
    print(f"{folder}: {before - left} lines shipped to {redact(uri)}, {left} left")
    return 0 if code == SHIPPED and not left else 1


def name_of_run(folder: Path, config: dict[str, Any]) -> str:
    """The name that the trainer gives a run, or as much of it as is known.

    Args:
        folder: of the run.
        config: what its configuration file holds; of another version perhaps, or nothing.
    """
    try:
        return run_name(RunConfig.model_validate(config))
    except ValueError:
        run = config.get("run")
        name = run.get("name") if isinstance(run, dict) else None
        return str(name or folder.resolve().name)


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, yaml.YAMLError):
        return {}
    return config if isinstance(config, dict) else {}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
