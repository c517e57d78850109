"""The command line of a launcher: ``--config FILE ... key=value ... [--check] [--explain KEY]``."""

from __future__ import annotations

import argparse
import difflib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NoReturn

from bdtrain.config.checks import absent_paths, check_paths
from bdtrain.config.explain import explain
from bdtrain.config.layout import resolve_layout
from bdtrain.config.loader import LoadedConfig, load_config
from bdtrain.config.problems import config_error
from bdtrain.config.schema import RunConfig
from bdtrain.config.summary import summarise, summarise_layout, summarise_time
from bdtrain.errors import ConfigError

EXAMPLES = """\
examples:
  %(prog)s --config configs/run/quickstart.yaml
  %(prog)s --config configs/run/quickstart.yaml optim.lr=1e-3 train.steps=500 "optim.betas=[0.9,0.95]"
  %(prog)s --config configs/run/quickstart.yaml --check              validate and show sizes, start nothing
  %(prog)s --config configs/run/quickstart.yaml --check --nodes 2 --gpus 8      plan for 16 ranks elsewhere
  %(prog)s --config configs/run/quickstart.yaml --explain optim.lr   what it is, its value and its origin
  %(prog)s --explain diffusion                                       the settings of a section

All settings: configs/reference.md. Defaults < bases < file < later files < overrides.
"""


@dataclass(frozen=True)
class CommandLine:
    """What the user asked for.

    Attributes:
        loaded: the checked configuration with its origins; None after ``--help``, or ``--explain`` without a
            file.
        finished: the request was answered (``--help``, ``--check``, ``--explain``): there is nothing to run.
    """

    loaded: LoadedConfig | None
    finished: bool

    @property
    def config(self) -> RunConfig:
        """The configuration to run.

        Raises:
            ConfigError: if there is none because the request is finished.
        """
        if self.loaded is None:
            raise ConfigError("no configuration was given; add --config FILE")
        return self.loaded.config


class _Parser(argparse.ArgumentParser):
    """argparse with its errors in our form."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message}; see --help")


def positive_int(text: str) -> int:
    """An option's value as a whole number of at least 1, for ``type=`` of argparse.

    Raises:
        argparse.ArgumentTypeError: if it is less; argparse names the option.
    """
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1; choose 1 or more")
    return number


def parse_command_line(
    arguments: Sequence[str], description: str, *, rank: int | None = None, world_size: int | None = None
) -> CommandLine:
    """Read a launcher's arguments; answer ``--help``, ``--check`` and ``--explain`` on the first rank.

    Nothing but the configuration is touched: no torch, no process group, no device.

    Args:
        arguments: without the program's name.
        description: what the launcher does, for ``--help``.
        rank: of this process; RANK in the environment, or 0, if None.
        world_size: processes that were started; WORLD_SIZE in the environment, or 1, if None.

    Returns:
        The request; look at ``finished`` first.

    Raises:
        ConfigError: listing everything that is wrong. Print it on the first rank only.
    """
    rank = _environment_int("RANK", 0) if rank is None else rank
    started = _environment_int("WORLD_SIZE", 1) if world_size is None else world_size
    parser = _parser(description)
    options, rest = parser.parse_known_args(list(arguments))
    if options.help:
        _print(parser.format_help(), rank)
        return CommandLine(None, finished=True)
    _refuse_options(parser, rest)
    _refuse_size_without_check(options)
    # argparse leaves overrides that stand between options to "rest".
    overrides = [*options.overrides, *rest]
    if options.explain is not None and not options.config and not overrides:
        _print(explain(options.explain, None), rank)
        return CommandLine(None, finished=True)
    if not options.config:
        raise ConfigError(
            "no configuration was given; add --config FILE, for example configs/run/quickstart.yaml"
        )
    loaded = load_config(options.config, overrides)
    if options.explain is not None:
        _print(explain(options.explain, loaded), rank)
    if options.check:
        _print(_checked(loaded.config, options, started), rank)
    finished = bool(options.check or options.explain is not None)
    return CommandLine(loaded, finished=finished)


def _parser(description: str) -> _Parser:
    parser = _Parser(
        description=description,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        add_help=False,
        allow_abbrev=False,
    )
    parser.add_argument("-h", "--help", action="store_true", help="show this text")
    parser.add_argument(
        "--config", action="append", metavar="FILE", help="YAML file of the run; repeat it, later files win"
    )
    parser.add_argument("--check", action="store_true", help="validate and print the sizes; start nothing")
    parser.add_argument(
        "--nodes",
        type=positive_int,
        metavar="N",
        help="with --check: plan for N machines; files that are not on this one are noted, not refused",
    )
    parser.add_argument(
        "--gpus", type=positive_int, metavar="M", help="with --check: ranks per machine (GPUs, or processes)"
    )
    parser.add_argument(
        "--explain", metavar="KEY", help="what a setting is, its value and where that came from"
    )
    # DeepSpeed's launcher inserts it; the environment says the same.
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="settings that win over the files")
    return parser


def _refuse_options(parser: _Parser, rest: Sequence[str]) -> None:
    """Refuse options that do not exist, all of them, each with the nearest one."""
    known = [
        option
        for action in parser._actions
        for option in action.option_strings
        if action.help != argparse.SUPPRESS
    ]
    problems = []
    for text in rest:
        if text.startswith("-"):
            name, _, value = text.partition("=")
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
            hint = f"did you mean {near[0]}?" if near else "see --help"
            if "." in name:
                hint = f"settings are given without dashes: {name.lstrip('-')}={value or 'VALUE'}"
            problems.append(f"{name} is not an option; {hint}")
    if problems:
        raise config_error(problems)


def _refuse_size_without_check(options: argparse.Namespace) -> None:
    """Here a size is for looking at a configuration; how many ranks start is the launcher's."""
    given = [f"--{name}" for name in ("nodes", "gpus") if getattr(options, name) is not None]
    if given and not options.check:
        hint = "the launcher says how many ranks a run has (deepspeed --num_gpus 2, srun --ntasks 2)"
        raise config_error([f"{name} is for --check only; {hint}" for name in given])


def _checked(config: RunConfig, options: argparse.Namespace, started: int) -> str:
    """What ``--check`` prints. With a size it is a plan, perhaps for another machine."""
    layout = resolve_layout(config, _checked_world_size(options, started))
    lines = [summarise(config), summarise_layout(config, layout)]
    if options.nodes is None and options.gpus is None:
        check_paths(config)
    else:
        lines.append(summarise_time(config, layout))
        lines += [f"  note       {note}" for note in absent_paths(config)]
    return "\n".join(lines)


def _checked_world_size(options: argparse.Namespace, started: int) -> int:
    """Ranks that ``--check`` looks at: what was asked for, else those that were started."""
    if options.nodes is None and options.gpus is None:
        return started
    return int((options.nodes or 1) * (options.gpus or 1))


def _print(text: str, rank: int) -> None:
    """Print on the first rank only: the others have nothing new to say."""
    if rank == 0:
        print(text.rstrip("\n"), flush=True)


def _environment_int(name: str, default: int) -> int:
    value = os.environ.get(name, "")
    return int(value) if value.isdigit() else default
