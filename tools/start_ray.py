r"""A Ray cluster of this machine alone, for ``ray job submit``: every socket on loopback, a token of its own.

    python tools/start_ray.py --cpus 2
    # in another shell, as it says:
    export RAY_AUTH_MODE=token RAY_AUTH_TOKEN_PATH=... RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0
    ray job submit --address http://127.0.0.1:8265 -- python launchers/refit_schedule.py --run RUN \
        refit.placement=ray refit.ray_address=auto

Ctrl-C ends it and everything in it. For a cluster of several machines start Ray as its own manual says, in a
private network, and name its address.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

from bdtrain.errors import BdtrainError, RefitError, report_failure
from bdtrain.refit.outcome import RaySettings
from bdtrain.refit.ray_cluster import (
    TOKEN_PATH,
    check_loopback,
    end_processes,
    listening_sockets,
    prepare_environment,
    private_folder,
    session_processes,
)

START_S = 120.0
END_S = 40.0


def main(arguments: list[str]) -> int:
    """Start, check, wait for Ctrl-C, end.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cpus", type=int, default=os.cpu_count() or 1, help="CPUs to offer (default: all)")
    parser.add_argument("--gpus", type=int, default=0, help="GPUs to offer (default: %(default)s)")
    parser.add_argument("--port", type=int, default=6379, help="of the cluster (default: %(default)s)")
    parser.add_argument(
        "--dashboard-port", type=int, default=8265, help="of jobs and pages (default: %(default)s)"
    )
    options = parser.parse_args(arguments)
    settings = RaySettings(
        address="local", num_workers=1, cpus_per_worker=options.cpus, gpus_per_worker=options.gpus
    )
    for number in (signal.SIGTERM, signal.SIGHUP):
        # Else the head, which has a session of its own, would outlive this.
        signal.signal(number, signal.default_int_handler)
    try:
        with private_folder(None) as folder:
            return serve(folder, settings, options)
    except (BdtrainError, OSError) as error:
        return report_failure(error)
    except KeyboardInterrupt:
        return 0


def serve(folder: Path, settings: RaySettings, options: argparse.Namespace) -> int:
    """Run the cluster's head until somebody ends it.

    Args:
        folder: private to this session, with its token.
        settings: of the session.
        options: of the command line.

    Raises:
        RefitError: if Ray does not start, or listens where others reach it.
    """
    prepare_environment(settings, folder, os.environ)
    command = [
        *(str(Path(sys.executable).parent / "ray"), "start", "--head", "--block"),
        *("--node-ip-address", "127.0.0.1", "--port", str(options.port)),
        *("--dashboard-host", "127.0.0.1", "--dashboard-port", str(options.dashboard_port)),
        *("--num-cpus", str(options.cpus), "--num-gpus", str(options.gpus)),
        *("--object-store-memory", str(settings.object_store_mb * 1_000_000)),
        *("--temp-dir", str(folder / "r"), "--disable-usage-stats"),
    ]
    log = folder / "start.log"
    with log.open("wb") as file:
        head = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True
        )
    try:
        sockets = wait_until_up(head, folder, options.dashboard_port, log)
        say(folder, options, sockets)
        head.wait()
        raise RefitError(f"Ray ended by itself with {head.returncode}: {last_line(log)}")
    finally:
        ours = session_processes(os.getpid(), folder)
        if head.poll() is None:
            head.send_signal(signal.SIGTERM)
        end_processes(ours, grace_s=END_S)


def wait_until_up(head: subprocess.Popen[bytes], folder: Path, port: int, log: Path) -> int:
    """Wait for the page of jobs, then look at every socket.

    Returns:
        Number of listening sockets, all on loopback.
    """
    import socket

    end = time.monotonic() + START_S
    while time.monotonic() < end:
        if head.poll() is not None:
            raise RefitError(f"Ray did not start: {last_line(log)}")
        with socket.socket() as probe:
            probe.settimeout(1.0)
            if probe.connect_ex(("127.0.0.1", port)) == 0:
                # Its helpers open theirs a little later.
                time.sleep(5.0)
                ours = {process.pid for process in session_processes(os.getpid(), folder)}
                if port not in {one.port for one in listening_sockets(ours)}:
                    raise RefitError(
                        f"port {port} of this machine is somebody else's; choose another --dashboard-port"
                    )
                return check_loopback(os.getpid(), folder)
        time.sleep(0.5)
    raise RefitError(f"Ray was not there after {START_S:g} s: {last_line(log)}")


def last_line(log: Path) -> str:
    """What Ray said last."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()]
    return next((line for line in reversed(lines) if line), "it said nothing")[:300]


def say(folder: Path, options: argparse.Namespace, sockets: int) -> None:
    """How to use it."""
    print(
        f"Ray is up: {sockets} listening sockets, all on loopback. In another shell:\n"
        f"  export RAY_AUTH_MODE=token {TOKEN_PATH}={os.environ[TOKEN_PATH]} "
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0\n"
        f"  ray job submit --address http://127.0.0.1:{options.dashboard_port} -- \\\n"
        "      python launchers/refit_schedule.py --run RUN refit.placement=ray refit.ray_address=auto\n"
        "Ctrl-C here ends it.",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
