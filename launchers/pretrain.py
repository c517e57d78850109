"""Train a model: ``deepspeed launchers/pretrain.py --config configs/run/quickstart.yaml [key=value ...]``."""

from __future__ import annotations

import os
import sys


def main(arguments: list[str]) -> int:
    """Read the configuration, train, report.

    Returns:
        The exit code: 0 done, or stopped on request and resumable (EXIT.json says which); 3 wrong
        configuration, 4 not finite, 6 data, 7 checkpoint, 8 a re-fit: its history is damaged, or a rank that
        the others wait for cannot finish it; 130 interrupted.
    """
    from bdtrain.config import check_paths, parse_command_line, resolve_layout
    from bdtrain.errors import BdtrainError, DataError, RankError, report_failure
    from bdtrain.parallel.launch_environment import read_launch
    from bdtrain.tracking.shipper import check_writers
    from bdtrain.train.signals import StopRequest

    first, started, launch = True, False, None
    try:
        launch = read_launch(os.environ)
        first = launch.rank == 0
        command = parse_command_line(
            arguments, description=__doc__ or "", rank=launch.rank, world_size=launch.world_size
        )
        if command.finished:
            return 0
        # What is wrong with the layout or the paths costs a second, not the imports below.
        layout = resolve_layout(command.config, launch.world_size)
        check_paths(command.config)
        check_writers(command.config)
        # Listens before the long imports: a launcher that dies meanwhile must be noticed.
        with StopRequest() as stop:
            # torch, DeepSpeed and Megatron are imported only for a configuration that is right.
            from bdtrain.parallel.libraries import prepare_libraries

            prepare_libraries()
            from bdtrain.tracking.console import Console
            from bdtrain.train.launch import train_from_config

            started = True
            console = Console(enabled=first)
            train_from_config(command.config, launch, layout, os.environ, console=console, stop=stop)
    except (BdtrainError, OSError, KeyboardInterrupt) as error:
        # What only one rank can know is told by that rank; before ranks meet, by the first of a machine.
        alone = isinstance(error, (DataError, RankError, OSError)) and not getattr(error, "everywhere", False)
        lone_machine = not started and launch is not None and launch.local_rank == 0
        return report_failure(error, enabled=first or alone or lone_machine)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
