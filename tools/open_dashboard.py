"""Open MLflow's page on a run, on this machine only: ``make dashboard RUN=runs/quickstart/run``.

    python tools/open_dashboard.py runs/quickstart/run
    python tools/open_dashboard.py runs/quickstart          # a folder above it will do where it holds one run

The server reads the database in the run's folder and listens on 127.0.0.1. Ctrl-C ends it. Needs the extra
``mlflow`` of setup.py, which ``make dashboard`` installs.
"""

from __future__ import annotations

import argparse
import os
import shlex
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
import webbrowser
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import FrameType
from typing import IO, Any, NoReturn

import yaml

from bdtrain.errors import BdtrainError, ConfigError, report_failure
from bdtrain.tracking.mlflow import default_uri, read_run_uid
from bdtrain.tracking.report import write_report
from bdtrain.tracking.run_files import ARTIFACTS, CONFIG_FILE, DATABASE_FILE, METRICS_FILE, REPORT_FILE
from bdtrain.tracking.spool import redact

HOST = "127.0.0.1"
DEPTH = 3
START_TIMEOUT_S = 120.0
STOP_GRACE_S = 5.0


def main(arguments: list[str]) -> int:
    """Serve until Ctrl-C.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="of the run")
    parser.add_argument("--port", type=int, default=5000, help="if it is free (default: %(default)s)")
    parser.add_argument("--open", action="store_true", help="show the page in a browser")
    options = parser.parse_args(arguments)
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) is not signal.SIG_IGN:  # nohup
            signal.signal(number, _interrupt)
    try:
        folder = find_run(options.folder)
        require_server()
        return serve(folder, choose_port(options.port), show=options.open)
    except (BdtrainError, OSError) as error:
        return report_failure(error)
    except KeyboardInterrupt:
        print("\nthe dashboard is closed")
        return 0


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    raise KeyboardInterrupt


def find_run(folder: Path) -> Path:
    """The run whose database to show: the folder itself, or the only one below it.

    Raises:
        ConfigError: if there is none, there are several, or the run has no database.
    """
    if not folder.is_dir():
        raise ConfigError(
            f"{folder} is no folder; give that of a run: make dashboard RUN=runs/quickstart/run"
        )
    if (folder / DATABASE_FILE).is_file():
        return folder
    if (folder / METRICS_FILE).is_file():
        raise ConfigError(_no_database(folder))
    runs = [path.parent for path in _below(folder, METRICS_FILE)]
    if not runs:
        raise ConfigError(
            f"{folder} holds no run (no {METRICS_FILE} within {DEPTH} folders); give the folder that "
            "run.folder named, for example make dashboard RUN=runs/quickstart/run"
        )
    if len(runs) > 1:
        newest = sorted(runs, key=lambda run: (run / METRICS_FILE).stat().st_mtime, reverse=True)
        lines = "".join(f"\n  make dashboard RUN={shlex.quote(str(run))}" for run in newest[:20])
        more = f"\n  and {len(runs) - 20} more" if len(runs) > 20 else ""
        raise ConfigError(f"{folder} holds {len(runs)} runs; choose one, the newest is first:{lines}{more}")
    return find_run(runs[0])


def _below(folder: Path, name: str) -> list[Path]:
    """Files of a name in the folders below, not too deep."""
    found = [path for depth in range(1, DEPTH + 1) for path in folder.glob(f"{'*/' * depth}{name}")]
    return [path for path in found if path.is_file()]


def _no_database(folder: Path) -> str:
    sync = f"python tools/mlflow_sync.py {shlex.quote(str(folder))}"
    try:
        tracking = yaml.safe_load((folder / CONFIG_FILE).read_text(encoding="utf-8"))["tracking"]
        uri = tracking.get("mlflow_uri")
    except (OSError, yaml.YAMLError, KeyError, TypeError, AttributeError):
        uri = None
    if uri:
        return (
            f"the metrics of {folder} go to {redact(str(uri))}: open that page, or make a database here with "
            f"{sync} --uri {shlex.quote(default_uri(folder))}"
        )
    return (
        f"{folder} has no {DATABASE_FILE}: tracking.mlflow was false, or nothing was shipped yet; {sync} "
        "makes it"
    )


def require_server() -> None:
    """Refuse where only MLflow's client is installed.

    Raises:
        ConfigError: saying how to install the server.
    """
    try:
        version("mlflow")
    except PackageNotFoundError:
        raise ConfigError(
            "MLflow's server is not installed, only its client; make dashboard installs it into .venv, "
            "elsewhere: pip install -c constraints.txt -e '.[mlflow]'"
        ) from None


def choose_port(wanted: int) -> int:
    """The wanted port if nothing listens there, else a free one.

    Raises:
        ConfigError: if it is no port.
    """
    if not 0 <= wanted <= 65535:
        raise ConfigError(f"--port {wanted} is no port; choose from 1 to 65535")
    for port in (wanted, 0):
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind((HOST, port))
            except OSError:
                continue
            return int(probe.getsockname()[1])
    raise ConfigError(f"no port of {HOST} is free")


def server_command(folder: Path, port: int) -> list[str]:
    """The command that serves a run's database on this machine only."""
    return [
        # -P: a file of the working folder must not hide a library.
        *(sys.executable, "-P", "-m", "mlflow", "server"),
        *("--backend-store-uri", default_uri(folder)),
        *("--default-artifact-root", (folder.resolve() / ARTIFACTS).as_uri()),
        *("--host", HOST, "--port", str(port), "--workers", "1"),
    ]


def find_page(folder: Path) -> str:
    """The part of the address that shows the run's curves; the experiments if the run is not found.

    Raises:
        ConfigError: if the database cannot be read.
    """
    uid = read_run_uid(folder).replace("'", "")
    tagged = "SELECT run_uuid FROM tags WHERE key = 'bdtrain.run_uid' AND value = ?"
    query = "SELECT experiment_id, run_uuid FROM runs WHERE lifecycle_stage = 'active' "
    address = f"{(folder.resolve() / DATABASE_FILE).as_uri()}?mode=ro"
    try:
        with closing(sqlite3.connect(address, uri=True, timeout=30)) as database:
            row = database.execute(
                f"{query} AND run_uuid IN ({tagged}) ORDER BY start_time DESC", (uid,)
            ).fetchone()
    except sqlite3.Error as error:
        if "no such table" in str(error):
            raise ConfigError(
                f"{folder / DATABASE_FILE} has no tables yet: nothing was shipped; try again in a minute"
            ) from error
        raise ConfigError(f"{folder / DATABASE_FILE} is no database of MLflow ({error})") from error
    # Without the last part MLflow 3 may open the pages of an LLM application, which have no curves.
    where = f"experiments/{row[0]}/runs/{row[1]}/model-metrics" if row else "experiments"
    return f"/#/{where}?workflowType=machine_learning"


def serve(folder: Path, port: int, *, show: bool) -> int:
    """Run the server until it ends or is interrupted.

    Args:
        folder: of the run.
        port: of this machine.
        show: whether to open a browser.

    Returns:
        The exit code.

    Raises:
        ConfigError: if the server does not start.
    """
    page = f"http://{HOST}:{port}{find_page(folder)}"
    environment = {
        **os.environ,
        "MLFLOW_DISABLE_TELEMETRY": "true",
        # Evaluations of LLM applications, run by a process of their own.
        "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",
    }
    with tempfile.TemporaryFile() as log:
        print(f"starting MLflow {version('mlflow')} on {folder / DATABASE_FILE} ...", flush=True)
        process = None
        try:
            # A session of its own: the terminal's Ctrl-C reaches this process alone, which ends the server's.
            process = subprocess.Popen(
                server_command(folder, port),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
            wait_until_ready(process, port, log)
            print(f"\n  curves   {page}\n  report   {refresh_report(folder)}\n\nCtrl-C ends it.", flush=True)
            if show:
                webbrowser.open(page)
            code = process.wait()
            raise ConfigError(f"the server ended with code {code}:\n{_end_of(log)}")
        finally:
            if process is not None:
                stop(process)


def wait_until_ready(process: subprocess.Popen[Any], port: int, log: IO[bytes]) -> None:
    """Wait until the server answers.

    Raises:
        ConfigError: if it ends or takes too long, with what it said.
    """
    until = time.monotonic() + START_TIMEOUT_S
    # Loopback is never behind a proxy.
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    while time.monotonic() < until:
        if process.poll() is not None:
            raise ConfigError(f"MLflow's server did not start (code {process.returncode}):\n{_end_of(log)}")
        try:
            with opener.open(f"http://{HOST}:{port}/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except (urllib.error.URLError, OSError):
            time.sleep(0.3)
    raise ConfigError(f"MLflow's server did not answer within {START_TIMEOUT_S:.0f} s:\n{_end_of(log)}")


def refresh_report(folder: Path) -> str:
    """The run's page as of now; where it cannot be written, the reason."""
    try:
        return str(write_report(folder))
    except (BdtrainError, OSError) as error:
        old = folder / REPORT_FILE
        return str(old) if old.is_file() else f"could not be written: {error}"


def stop(process: subprocess.Popen[Any]) -> None:
    """End the server and every process it started; a second signal does not leave any of them behind."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    for number in (signal.SIGTERM, signal.SIGKILL):
        try:
            os.killpg(process.pid, number)
        except ProcessLookupError:
            break
        try:
            process.wait(STOP_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
    process.wait()


def _end_of(log: IO[bytes], lines: int = 8) -> str:
    log.seek(0)
    return "\n".join(log.read().decode(errors="replace").splitlines()[-lines:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
