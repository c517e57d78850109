"""From text to a trained block diffusion model: ``make quickstart`` or ``make quickstart INPUT=my/texts``.

Without ``--input`` the text is the source code of Python's own standard library, which every machine that can
run this has. The steps are the ones a real run takes, by the same commands; each is printed before it runs.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

from bdtrain.data.preprocess import document_hash
from bdtrain.data.text import TextOptions, describe_inputs, find_inputs, plan_tasks, read_documents
from bdtrain.errors import BdtrainError
from bdtrain.tracking.report import write_report

ROOT = Path(__file__).resolve().parent.parent
MARKER = ".quickstart"
VALID_FRACTION = 0.04
OWN_SETTINGS = ("run.name", "run.folder", "data.path", "validation.at_start", "checkpoint.save_final")
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"}


def parse() -> argparse.Namespace:
    """The command line, with ``folder`` and ``source`` as whole paths; ``source`` is None for a pattern."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--input", help="your text: .txt, .jsonl or .jsonl.gz files or a folder of them")
    add(
        "--folder", help="where everything goes (default: runs/quickstart, with --input runs/quickstart-NAME)"
    )
    add("--vocab-size", type=int, default=2048, help="size of the tokenizer (default: %(default)s)")
    add("--config", default="configs/run/quickstart.yaml", help="the run (default: %(default)s)")
    add("--ranks", type=int, default=1, help="processes that train together (default: %(default)s)")
    add("overrides", nargs="*", help="key=value settings for the run, for example train.steps=1000")
    options = parser.parse_args()
    for word in options.overrides:
        if word.split("=")[0] in OWN_SETTINGS:
            parser.error(f"{word}: the quickstart sets {', '.join(OWN_SETTINGS)} itself")
    default = f"runs/quickstart-{plain(Path(options.input).stem)}" if options.input else "runs/quickstart"
    folder = Path(options.folder or default).resolve()
    source = Path(options.input).resolve() if options.input and "*" not in options.input else None
    if source is not None and not source.exists():
        parser.error(f"--input {options.input}: there is no such file or folder")
    if source is not None and source.is_relative_to(folder):
        parser.error(f"--input {options.input} lies in --folder {shown(folder)}; choose another --folder")
    options.folder, options.source = folder, source
    return options


def main() -> int:
    """Run every step.

    Returns:
        The exit code of the first step that failed, or 0.
    """
    options = parse()
    folder = options.folder
    started = time.monotonic()
    name = shown(folder)
    words = ["--config", options.config, f"run.name={plain(folder.name)}", f"run.folder={name}/run"]
    settings = shlex.join([*words, f"data.path={name}/corpus", *options.overrides])
    try:
        # A wrong setting is told now, not after the tokenizer and the shards.
        check = f"python launchers/pretrain.py {settings} --check --nodes 1 --gpus {options.ranks}"
        run_command(check, stdout=subprocess.DEVNULL)
        make_way(folder)
        folder.mkdir(parents=True)
        with held(folder):
            run_steps(folder, options, settings)
            show(folder, write_summary(folder, time.monotonic() - started))
            show_next(folder, settings, options)
    except BdtrainError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except subprocess.CalledProcessError as error:
        print(f"\nquickstart stopped: the step above ended with code {error.returncode}", file=sys.stderr)
        return error.returncode if error.returncode > 0 else 1
    except (InterruptedStepError, KeyboardInterrupt):
        print("\nquickstart stopped.", file=sys.stderr)
        if any((folder / "run" / "checkpoints").glob("step-*")):
            print(f"The training goes on with:\n  {train_on(settings, options.ranks)}", file=sys.stderr)
        return 130
    return 0


class InterruptedStepError(Exception):
    """Somebody asked a step to stop, and it did."""


def run_steps(folder: Path, options: argparse.Namespace, settings: str) -> None:
    """Tokenizer, shards, training, evaluation.

    Raises:
        CalledProcessError: by the step that failed.
        InterruptedStepError: if the training was stopped.
    """
    print("The commands are for a shell in this folder after: source .venv/bin/activate")
    source = options.source
    text = shown(source) if source else options.input or shown(collect_standard_library(folder / "text"))
    train, held_out = choose_held_out(text, folder / "text")
    place = shlex.quote(shown(folder))
    run_step(
        "1/4 tokenizer",
        f"python tools/train_tokenizer.py --input {train} --vocab-size {options.vocab_size} "
        f"--out {place}/tokenizer",
    )
    run_step(
        "2/4 shards",
        f"python tools/preprocess.py --input {train} --tokenizer {place}/tokenizer/tokenizer.model "
        f"--out {place}/corpus {held_out}",
    )
    run_step(
        "3/4 training",
        f"deepspeed --log_level error --num_gpus {options.ranks} launchers/pretrain.py {settings}",
    )
    ended = json.loads((folder / "run" / "EXIT.json").read_text(encoding="utf-8"))
    if ended["reason"] != "finished":
        raise InterruptedStepError
    run_step(
        "4/4 evaluation of the saved weights, beside the baselines",
        f"python launchers/evaluate_checkpoint.py --checkpoint {place}/run/checkpoint "
        f"--data {place}/corpus --baselines --json {place}/evaluation.json",
    )


def choose_held_out(text: str, folder: Path) -> tuple[str, str]:
    """What to train on and what to hold out, as words for the shell.

    A share of the documents; where that would be none or all of them, the one with the lowest hash; of a
    single document, its last tenth.

    Args:
        text: file, folder or pattern.
        folder: for the parts of a single document.
    """
    options = TextOptions()
    described = describe_inputs(find_inputs([text], options))
    pieces = (piece for task in plan_tasks(described) for piece in task)
    hashes: set[float] = set()
    only = ""
    for document in (
        found.text for piece in pieces for found in read_documents(piece, options) if found.text
    ):
        only = "" if hashes else document
        hashes.add(document_hash(document.encode()))
        if min(hashes) < VALID_FRACTION <= max(hashes):
            return shlex.quote(text), f"--valid-fraction {VALID_FRACTION:g}"  # some on either side
    if only:
        folder.mkdir(parents=True, exist_ok=True)
        cut = len(only) * 9 // 10
        for name, part in (("train.txt", only[:cut]), ("valid.txt", only[cut:])):
            (folder / name).write_text(part, encoding="utf-8")
        place = shlex.quote(shown(folder))
        return f"{place}/train.txt", f"--valid-input {place}/valid.txt"
    lowest = sorted(hashes)[:2]
    fraction = sum(lowest) / 2 if len(lowest) == 2 else VALID_FRACTION
    return shlex.quote(text), f"--valid-fraction {fraction:.9g}"


@contextmanager
def held(folder: Path) -> Iterator[None]:
    """Hold the folder while something works in it; the kernel lets go when the process ends."""
    with (folder / MARKER).open("w", encoding="ascii") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield


def make_way(folder: Path) -> None:
    """Move an earlier quickstart aside, under the next free number. Nothing is ever removed."""
    if not folder.exists():
        return
    if not (folder / MARKER).exists():
        raise SystemExit(f"error: {folder} exists and is no quickstart's; choose another --folder")
    with (folder / MARKER).open("r", encoding="ascii") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise SystemExit(
                f"error: another quickstart is at work in {shown(folder)}; wait for it, or choose another "
                "--folder"
            ) from None
    number = 1
    while (aside := folder.with_name(f"{folder.name}.{number}")).exists():
        number += 1
    folder.rename(aside)
    print(f"the earlier quickstart is now in {aside}")


def collect_standard_library(folder: Path) -> Path:
    """One JSON line per source file of the standard library, tests left out.

    Returns:
        The file that was written.
    """
    library = Path(sysconfig.get_paths()["stdlib"])
    folder.mkdir(parents=True)
    out = folder / "standard-library.jsonl"
    documents = size = left_out = 0
    with out.open("w", encoding="utf-8") as file:
        for path in sorted(library.rglob("*.py")):
            if LEFT_OUT & set(path.relative_to(library).parts):
                continue
            try:
                text = path.read_text(encoding="utf-8")
            except UnicodeDecodeError:
                left_out += 1  # a handful of files declare another encoding on purpose
                continue
            if text.strip():
                file.write(json.dumps({"id": path.relative_to(library).as_posix(), "text": text}) + "\n")
                documents, size = documents + 1, size + len(text.encode())
    print(
        f"text: {documents} source files of Python's standard library, {size / 1e6:.1f} MB, from {library}"
        + (f" ({left_out} that are not UTF-8 left out)" if left_out else "")
    )
    return out


def run_step(title: str, command: str) -> None:
    """Print and run one command from the repository's root.

    Raises:
        CalledProcessError: if it failed.
        InterruptedStepError: on Ctrl-C, which the command has got too, and has answered.
    """
    print(f"\n== {title}\n$ {command}", flush=True)
    run_command(command)


def run_command(command: str, **settings: Any) -> None:
    """Run a command with the programs of this Python."""
    program, *words = shlex.split(command)
    # DeepSpeed's launcher starts `python` by its name: the folder of the Python that runs this comes first.
    folder = Path(sys.executable).parent
    environment = dict(os.environ, OMP_WAIT_POLICY="passive")
    environment["PATH"] = f"{folder}{os.pathsep}{environment.get('PATH', '')}"
    if shutil.which("nvidia-smi") is None:
        environment.setdefault("DS_ACCELERATOR", "cpu")  # else DeepSpeed warns that it found nothing else
    process = subprocess.Popen([str(folder / program), *words], cwd=ROOT, env=environment, **settings)
    try:
        code = process.wait()
    except KeyboardInterrupt:
        process.wait()
        raise InterruptedStepError from None
    if code:
        raise subprocess.CalledProcessError(code, command)


def write_summary(folder: Path, wall_seconds: float) -> dict[str, Any]:
    """Put the numbers of the run and of the evaluation side by side in ``summary.json``."""
    run = json.loads((folder / "run" / "summary.json").read_text(encoding="utf-8"))
    evaluation = json.loads((folder / "evaluation.json").read_text(encoding="utf-8"))
    if evaluation["tokens"] != run["after"]["tokens"]:
        raise SystemExit(
            f"error: training was validated on {run['after']['tokens']} tokens, the baselines on "
            f"{evaluation['tokens']}; leave validation.sequences out"
        )
    summary = {
        "nelbo_before": run["before"]["nelbo"],
        "nelbo_after": run["after"]["nelbo"],
        "ppl_before": run["before"]["ppl"],
        "ppl_after": run["after"]["ppl"],
        "bpb_before": run["before"]["bpb"],
        "bpb_after": run["after"]["bpb"],
        **evaluation["baselines"],
        "tokens_per_second": run["tokens_per_second"],
        "wall_seconds": wall_seconds,
        "checkpoint": run["checkpoint"],
    }
    # The saved weights, read back from disk, must be worth what the run said.
    if abs(evaluation["nelbo"] - run["after"]["nelbo"]) > 1e-4:
        raise SystemExit(
            f"error: the saved weights give {evaluation['nelbo']}, the run said {run['after']['nelbo']}"
        )
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


def show(folder: Path, summary: dict[str, Any]) -> None:
    """The result and what to do next."""
    rows = [
        ("this model, before training", summary["bpb_before"]),
        ("unigram over the same tokens", summary["unigram_bpb"]),
        ("bigram over the same tokens", summary["bigram_bpb"]),
        ("gzip -9", summary["gzip_bpb"]),
        ("this model, after training", summary["bpb_after"]),
    ]
    print("\nheld-out text, bits per byte (lower is better)")
    for name, value in rows:
        print(f"  {name:<32}{value:8.3f}")
    print(
        f"NELBO {summary['nelbo_before']:.3f} -> {summary['nelbo_after']:.3f} nats/token, "
        f"PPL <= {summary['ppl_before']:.0f} -> {summary['ppl_after']:.1f}, "
        f"{summary['tokens_per_second']:.0f} tokens/s"
    )
    if summary["bpb_after"] > summary["bigram_bpb"]:
        print("(a table of bigrams of the same tokens takes more steps to pass: train on, below)")
    samples = folder / "run" / "samples.jsonl"
    if samples.exists():  # there is none with validation.sample_tokens=0
        last = samples.read_text(encoding="utf-8").splitlines()[-1]
        print(f"\na sample after training:\n{json.loads(last)['text']}")
    place = shown(folder)
    print(
        f"\nDone in {summary['wall_seconds'] / 60:.1f} minutes. {place}/summary.json holds the numbers, "
        f"{place}/run/metrics.jsonl the curve."
    )


def show_next(folder: Path, run: str, options: argparse.Namespace) -> None:
    """Where to look, and what to do next: commands for the repository's root, FILE and INPUT aside.

    Args:
        folder: of the quickstart.
        run: the arguments of the training.
        options: what the quickstart was asked for.
    """
    python = shlex.quote(shown(Path(sys.executable)))
    place, weights = shlex.quote(shown(folder / "run")), shlex.quote(shown(folder / "run" / "checkpoint"))
    report = folder / "run" / "report.html"
    try:
        write_report(folder / "run")  # anew, with the baselines
    except (BdtrainError, OSError) as error:
        print(f"the report was not written: {error}", file=sys.stderr)
    batch = yaml.safe_load((folder / "run" / "config.yaml").read_text(encoding="utf-8"))["train"]
    ranks = 2 * options.ranks
    rows = [
        ("look", report.as_uri() if report.is_file() else ""),
        ("curves", f"make dashboard RUN={place}    (the first time it installs MLflow's server, 150 MB)"),
        ("sample", f"{python} launchers/sample_text.py --checkpoint {weights} --prompt 'def main('"),
        ("evaluate", f"{python} launchers/evaluate_checkpoint.py --checkpoint {weights} --text FILE"),
        ("train on", train_on(run, options.ranks, steps=2 * batch["steps"])),
        ("own text", "" if options.input else "make quickstart INPUT=path/to/your/texts"),
        ("more ranks", again(options, f"ranks{ranks}", ranks=ranks)),
        ("block size", again(options, "block4", override="diffusion.block_size=4")),
    ]
    left_out = set() if any((folder / "run" / "checkpoints").glob("step-*")) else {"train on"}
    if batch["global_batch_size"] % ranks:
        left_out.add("more ranks")
    print("\nNext:")
    for name, command in rows:
        if command and name not in left_out:
            print(f"  {name:<12}{command}")


def train_on(run: str, ranks: int, *, steps: int | None = None) -> str:
    """The command that continues the training, up to more steps where they are given."""
    words = shlex.split(run)
    if steps is not None:
        words = [word for word in words if not word.startswith("train.steps=")] + [f"train.steps={steps}"]
    python = Path(sys.executable)
    start = f"PATH={shlex.quote(str(python.parent))}:$PATH deepspeed --num_gpus {ranks}"
    program = start if ranks > 1 else shlex.quote(shown(python))
    return f"{program} launchers/pretrain.py {shlex.join(words)}"


def again(
    options: argparse.Namespace, name: str, *, ranks: int | None = None, override: str | None = None
) -> str:
    """The command of the same quickstart with one thing changed, into a folder of its own."""
    words = [shown(Path(sys.executable)), "tools/quickstart.py"]
    words += ["--folder", shown(options.folder.with_name(f"{options.folder.name}-{name}"))]
    if options.input:
        words += ["--input", shown(options.source) if options.source else options.input]
    if options.vocab_size != 2048:
        words += ["--vocab-size", str(options.vocab_size)]
    if options.config != "configs/run/quickstart.yaml":
        words += ["--config", options.config]
    if (ranks or options.ranks) > 1:
        words += ["--ranks", str(ranks or options.ranks)]
    key = override.split("=")[0] if override else None
    words += [word for word in options.overrides if word.split("=")[0] != key]
    return shlex.join([*words, *([override] if override else [])])


def plain(name: str) -> str:
    """A name that a run may have."""
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-._") or "text"


def shown(path: Path) -> str:
    """A path as a user would write it in the repository's root."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)


if __name__ == "__main__":
    sys.exit(main())
