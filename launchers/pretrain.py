"""Train a model: ``deepspeed launchers/pretrain.py --config configs/run/quickstart.yaml [key=value ...]``."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Read the configuration, train, report.

    Returns:
        The exit code: 0 done, 3 wrong configuration, 4 not finite, 6 data, 7 checkpoint, 130 interrupted.
    """
    from bdtrain.config import parse_command_line
    from bdtrain.errors import BdtrainError, report_failure

    first = os.environ.get("RANK", "0") == "0"
    try:
        command = parse_command_line(arguments, description=__doc__ or "")
        if command.finished:
            return 0
        # torch, DeepSpeed and Megatron are imported only for a configuration that is right.
        from bdtrain.parallel.libraries import prepare_libraries

        prepare_libraries()
        from bdtrain.tracking.console import Console
        from bdtrain.train.launch import train_from_config

        train_from_config(command.config, os.environ, console=Console(enabled=first))
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        return report_failure(error, enabled=first)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
