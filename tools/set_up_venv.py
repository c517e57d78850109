"""Make ``.venv`` fit for a target of the Makefile.

    python3.11 tools/set_up_venv.py --extras dev --torch cpu

Standard library only, because it runs before anything is installed. What was installed is recorded in
``.venv/.stamp``; when that still holds, nothing happens. An interrupted set-up is continued by the next call.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / ".stamp"
LOG = VENV / "install.log"
SOURCES = ("setup.py", "constraints.txt", "pyproject.toml")
TORCH = "2.13.0"
# Inside .venv itself this is the Python it was made from: a venv cannot remake itself.
BASE_PYTHON = str(getattr(sys, "_base_executable", None) or sys.executable)
MIN_FREE_GB = {"cpu": 4, "cuda": 14, "installed": 2}
# About what pip fetches on Linux x86-64, in MB; wheels in pip's cache are not fetched again.
SIZES_MB = {"cpu": 192, "cuda": 2800, "base": 55, "dev": 340, "ray": 105, "mlflow": 152}


@dataclass(frozen=True)
class Stamp:
    """What a ``.venv`` holds.

    Attributes:
        digest: of the files that decide what is installed.
        python: major and minor version.
        torch: ``cpu``, ``cuda`` or ``installed``.
        extras: of setup.py, sorted.
    """

    digest: str
    python: str
    torch: str
    extras: tuple[str, ...]


class SetUpError(Exception):
    """The environment cannot be made; the message says what to do."""


def main(arguments: list[str]) -> int:
    """Set up or find everything in place.

    Returns:
        The exit code.
    """
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--extras", default="", help="comma-separated extras of setup.py")
    parser.add_argument(
        "--torch", choices=("cpu", "cuda", "installed", "auto"), default="auto", help="which torch"
    )
    options = parser.parse_args(arguments)
    recorded = read_stamp()
    torch = choose_torch(options.torch, recorded)
    extras = tuple(sorted({extra for extra in options.extras.split(",") if extra}))
    wanted = Stamp(digest_of_sources(), "{}.{}".format(*sys.version_info), torch, extras)
    if recorded is not None and fits(recorded, wanted) and works():
        return 0
    try:
        # Extras that other targets asked for stay.
        kept = recorded.extras if recorded is not None and recorded.python == wanted.python else ()
        set_up(replace(wanted, extras=tuple(sorted({*extras, *kept}))), recorded)
    except SetUpError as error:
        print(f"\nset-up failed: {error}", file=sys.stderr)
        return 2
    return 0


def choose_torch(choice: str, recorded: Stamp | None) -> str:
    """``auto`` keeps what is there; else CUDA where the NVIDIA tools are, the CPU build elsewhere."""
    if choice != "auto":
        return choice
    if recorded is not None:
        return recorded.torch
    return "cuda" if shutil.which("nvidia-smi") else "cpu"


def digest_of_sources() -> str:
    """Digest of the files that decide what is installed."""
    digest = hashlib.sha256()
    for name in SOURCES:
        digest.update((ROOT / name).read_bytes())
    return digest.hexdigest()[:16]


def read_stamp() -> Stamp | None:
    """What ``.venv`` records, or None."""
    try:
        values = json.loads(STAMP.read_text(encoding="utf-8"))
        return Stamp(values["digest"], values["python"], values["torch"], tuple(values["extras"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None


def fits(recorded: Stamp, wanted: Stamp) -> bool:
    """Whether an environment serves a request."""
    same = (recorded.digest, recorded.python, recorded.torch) == (wanted.digest, wanted.python, wanted.torch)
    return same and set(wanted.extras) <= set(recorded.extras)


def works() -> bool:
    """Whether the interpreter of ``.venv`` is still there (its base may have been removed)."""
    return (VENV / "bin" / "python").exists()


def set_up(wanted: Stamp, recorded: Stamp | None) -> None:
    """Install.

    Raises:
        SetUpError: if the environment cannot be made.
    """
    started = time.monotonic()
    # Asked before an existing .venv is touched.
    outside = installed_outside() if wanted.torch == "installed" else set()
    announce(wanted, recorded)
    make_venv(wanted, recorded)
    STAMP.unlink(missing_ok=True)
    LOG.write_text("", encoding="utf-8")
    constraints = VENV / "constraints.txt"
    registry_build = wanted.torch == "cuda"
    if wanted.torch == "cpu":
        registry_build = install_cpu_torch()
    elif wanted.torch == "cuda":
        # Three equal signs: exactly this text, so that a CPU build on offer is not taken for it.
        pip("torch (CUDA)", f"torch==={TORCH}")
    left_out = {"torch", "triton"} if registry_build else set()
    if wanted.torch == "installed":
        left_out = {"torch", "triton", *outside}
    constraints.write_text(constraints_without(left_out), encoding="utf-8")
    extras = f"[{','.join(wanted.extras)}]" if wanted.extras else ""
    # PEP 517 builds DeepSpeed's source package in an environment of its own without torch: no op is compiled.
    pip("bdtrain and what it needs", "--use-pep517", "-c", str(constraints), "-e", f"{ROOT}{extras}")
    check_imports(wanted)
    STAMP.write_text(json.dumps(asdict(wanted)), encoding="utf-8")
    print(f"set-up done in {time.monotonic() - started:.0f} s; details in .venv/install.log\n", flush=True)


def announce(wanted: Stamp, recorded: Stamp | None) -> None:
    """Say what will be fetched, before it is, and refuse when the disk cannot hold it.

    Args:
        wanted: what shall be there.
        recorded: what is there, as far as it is known.
    """
    rows = []
    stays = (
        recorded is not None
        and works()
        and (recorded.digest, recorded.python, recorded.torch) == (wanted.digest, wanted.python, wanted.torch)
    )
    there = set(recorded.extras) if recorded is not None and stays else set()
    if wanted.torch != "installed" and not stays:
        rows.append(
            (f"torch {TORCH}, {'CUDA' if wanted.torch == 'cuda' else 'CPU'} build", SIZES_MB[wanted.torch])
        )
    if not stays:
        rows.append(("DeepSpeed, megatron-core, MLflow client, ...", SIZES_MB["base"]))
    rows += [
        (f"extra [{extra}]", SIZES_MB[extra])
        for extra in wanted.extras
        if extra in SIZES_MB and extra not in there
    ]
    print(f"Setting up .venv with Python {wanted.python} ({BASE_PYTHON}), torch: {wanted.torch}")
    if rows:
        print("To download (about; less with a warm pip cache):")
    for name, size in [*rows, ("together", sum(size for _, size in rows))] if len(rows) > 1 else rows:
        print(f"  {name:<46}{size:>6} MB")
    if stays:
        print("The rest is there.")
    unknown = [extra for extra in wanted.extras if extra not in SIZES_MB]
    if unknown:
        print(f"  and extra [{','.join(unknown)}], not measured")
    print(end="", flush=True)
    free = shutil.disk_usage(ROOT).free / 1e9
    if free < MIN_FREE_GB[wanted.torch]:
        need = MIN_FREE_GB[wanted.torch]
        raise SetUpError(f"{free:.1f} GB are free on the disk of {ROOT}; about {need} GB are needed")


def make_venv(wanted: Stamp, recorded: Stamp | None) -> None:
    """Create ``.venv``, or keep one that has the right Python and the right view of the system's packages."""
    system = wanted.torch == "installed"
    if VENV.is_symlink() or (VENV.exists() and not VENV.is_dir()):
        raise SetUpError(f"{VENV} is not a folder; remove it")
    if VENV.exists():
        same_torch = recorded is None or recorded.torch == wanted.torch
        if same_torch and works() and describe_venv() == (wanted.python, system):
            return
        print("the existing .venv has another Python or torch: making it anew", flush=True)
    command = [BASE_PYTHON, "-m", "venv", "--clear", str(VENV)] + ["--system-site-packages"] * system
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        shutil.rmtree(VENV, ignore_errors=True)
        raise SetUpError(
            f"{BASE_PYTHON} cannot make a virtual environment: "
            f"{last_lines(result.stdout + result.stderr, 3)}\n"
            "On Debian and Ubuntu install the package python3-venv (python3.11-venv, python3.12-venv)."
        )


def describe_venv() -> tuple[str, bool] | None:
    """(Python version, system packages visible) of the existing ``.venv``."""
    try:
        text = (VENV / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return None
    version = re.search(r"^version\s*=\s*(\d+\.\d+)", text, re.MULTILINE)
    system = re.search(r"^include-system-site-packages\s*=\s*true", text, re.MULTILINE | re.IGNORECASE)
    return (version.group(1), system is not None) if version else None


def install_cpu_torch() -> bool:
    """Install the CPU build where one is on offer.

    Returns:
        True when the registry's plain build had to be taken.
    """
    index = os.environ.get("TORCH_INDEX_URL", "")
    where = ["--extra-index-url", index] if index else []
    if platform.system() != "Linux":
        pip("torch", f"torch=={TORCH}", *where)
        return False
    if pip("torch (CPU)", f"torch=={TORCH}+cpu", *where, may_fail=True):
        return False
    print(
        f"pip's settings offer no CPU build of torch {TORCH} for Python "
        f"{sys.version_info[0]}.{sys.version_info[1]}.\n"
        f"Taking the registry's build, which brings CUDA libraries: about {SIZES_MB['cuda']} MB instead of "
        f"{SIZES_MB['cpu']} MB.\n"
        "To avoid that, stop now (Ctrl-C) and run  TORCH_INDEX_URL=<an index with CPU builds> make ...,  or\n"
        "TORCH=installed make ...  with a torch that this Python already has.",
        flush=True,
    )
    pip("torch (registry's build)", f"torch==={TORCH}")
    return True


def installed_outside() -> set[str]:
    """Normalised names of the packages that ``.venv`` sees in the system's Python: their versions stay."""
    code = (
        "import importlib.metadata as m; print(*(d.metadata['Name'] for d in m.distributions()), sep='\\n')"
    )
    result = subprocess.run([BASE_PYTHON, "-c", code], capture_output=True, text=True, check=False)
    names = {normalise(name) for name in result.stdout.split()}
    if "torch" not in names:
        raise SetUpError(
            f"TORCH=installed, but {BASE_PYTHON} has no torch. Choose another Python (PYTHON=/path/to/python "
            f"make ...) or another torch (TORCH=cpu or TORCH=cuda)."
        )
    return names


def constraints_without(names: set[str]) -> str:
    """The lines of constraints.txt but for some packages."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return "\n".join(line for line in lines if normalise(line.partition("==")[0]) not in names) + "\n"


def normalise(name: str) -> str:
    """A package name in the form in which names are compared."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()


def pip(title: str, *arguments: str, may_fail: bool = False) -> bool:
    """Run ``pip install``, showing one line per large download and the rest as a count.

    Returns:
        Whether it succeeded.

    Raises:
        SetUpError: if it failed and must not.
    """
    command = [str(VENV / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
    command += ["--no-input", "--progress-bar", "off", *arguments]
    environment = {**os.environ, "DS_BUILD_OPS": "0", "PYTHONUNBUFFERED": "1"}
    started = time.monotonic()
    print(f"installing {title} ...", flush=True)
    packages, count, output = 0, 0, []
    process = subprocess.Popen(
        command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert process.stdout is not None
    with LOG.open("a", encoding="utf-8") as log:
        log.write(f"$ {' '.join(command)}\n")
        for line in process.stdout:
            log.write(line)
            output.append(line)
            packages += line.startswith("Collecting ")
            if line.startswith("Successfully installed "):
                count = len(line.split()) - 2
            show_progress(line, packages, time.monotonic() - started)
    code = process.wait()
    if code == 0:
        print(f"  {count} packages installed, {time.monotonic() - started:.0f} s", flush=True)
        return True
    if may_fail:
        return False
    raise SetUpError(
        f"pip could not install {title}:\n{last_lines(''.join(output), 12)}\nAll of it: .venv/install.log"
    )


def show_progress(line: str, packages: int, seconds: float) -> None:
    """A line for a download of 20 MB or more, and for the slow stages of pip."""
    download = re.match(r"\s*Downloading (\S+?)(?:-cp|-py|-\d).* \((\d+(?:\.\d+)?) (MB|GB)\)", line)
    if download and (download.group(3) == "GB" or float(download.group(2)) >= 20):
        name = download.group(1).rpartition("/")[2]
        print(
            f"  [{seconds:4.0f} s] package {packages}: fetching {name}, {download.group(2)} "
            f"{download.group(3)}",
            flush=True,
        )
    elif line.startswith("Installing collected packages"):
        print(f"  [{seconds:4.0f} s] writing {line.count(',') + 1} packages", flush=True)


def check_imports(wanted: Stamp) -> None:
    """Import what everything rests on, so that a broken set-up is found here and not in a run."""
    code = (
        "import torch, pydantic, omegaconf, sentencepiece, bdtrain, bdtrain_kernels; print(torch.__version__)"
    )
    python = VENV / "bin" / "python"
    result = subprocess.run([str(python), "-c", code], cwd=VENV, capture_output=True, text=True, check=False)
    if result.returncode:
        raise SetUpError(f"the installed packages do not import:\n{last_lines(result.stderr, 5)}")
    print(f"torch {result.stdout.strip()} and bdtrain import ({wanted.torch})", flush=True)


def last_lines(text: str, count: int) -> str:
    """The end of a longer text."""
    return "\n".join(text.strip().splitlines()[-count:])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
