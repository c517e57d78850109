"""What would break an installation or hide somebody else's package."""

from __future__ import annotations

import ast
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest
from packaging.requirements import Requirement

import bdtrain

HARMLESS: frozenset[str] = frozenset()


def setup_value(repository: Path, name: str) -> object:
    """A constant of setup.py, with the names inside it resolved."""
    constants: dict[str, object] = {}
    for node in ast.parse((repository / "setup.py").read_text(encoding="utf-8")).body:
        if (
            isinstance(node, ast.Assign)
            and isinstance(node.targets[0], ast.Name)
            and node.targets[0].id != "ROOT"
        ):
            code = compile(ast.Expression(node.value), "setup.py", "eval")
            constants[node.targets[0].id] = eval(code, {}, dict(constants))
    return constants[name]


def requirements(repository: Path) -> list[Requirement]:
    extras = setup_value(repository, "EXTRAS")
    assert isinstance(extras, dict)
    lines = [*setup_value(repository, "REQUIRES"), *(line for lines in extras.values() for line in lines)]
    return [Requirement(line) for line in lines]


def pins(repository: Path) -> dict[str, str]:
    lines = (repository / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in pairs}


def test_kernels_is_no_package(repository: Path) -> None:
    assert not (repository / "kernels" / "__init__.py").exists(), (
        "kernels/ is a source root: with an __init__.py it would hide the well-used package named kernels "
        "from every process whose path holds the repository (python -m, Ray's working directory, multi-node "
        "deepspeed)"
    )


def test_every_folder_of_code_is_a_package(repository: Path) -> None:
    # setuptools finds only folders with __init__.py, and a mapped folder without one does not import when
    # editable.
    for top in (repository / "bdtrain", repository / "kernels" / "bdtrain_kernels"):
        assert top.is_dir()
        for folder in {path.parent for path in top.rglob("*.py")}:
            assert (folder / "__init__.py").is_file(), f"{folder} has no __init__.py"
        assert (top / "py.typed").is_file()


def script_names(repository: Path) -> list[Path]:
    folders = ("launchers", "tools", "kernels/bench")
    return sorted(path for folder in folders for path in (repository / folder).rglob("*.py"))


def test_no_script_has_the_name_of_something_importable(repository: Path) -> None:
    # A script's own folder comes first on the path: launchers/ray.py would make `import ray` load itself.
    taken = []
    for path in script_names(repository):
        spec = importlib.util.find_spec(path.stem)
        ours = spec is not None and spec.origin is not None and Path(spec.origin).resolve() == path.resolve()
        known = path.stem in sys.stdlib_module_names or (spec is not None and not ours)
        if known and path.stem not in HARMLESS:
            taken.append(path.relative_to(repository).as_posix())
    assert not taken


def test_the_name_check_would_see_a_library() -> None:
    assert importlib.util.find_spec("deepspeed") is not None
    assert "profile" in sys.stdlib_module_names


def test_launchers_guard_their_entry(repository: Path) -> None:
    # Checkpoint saving spawns processes that import the launcher again.
    launchers = sorted((repository / "launchers").glob("*.py"))
    assert launchers
    for path in launchers:
        assert 'if __name__ == "__main__":' in path.read_text(encoding="utf-8"), path


def test_the_version_is_read_without_importing(repository: Path) -> None:
    code = (
        "import sys, types\n"
        "seen = {}\n"
        "fake = types.ModuleType('setuptools')\n"
        "fake.setup = lambda **k: seen.update(k)\n"
        "fake.find_packages = lambda *a, **k: []\n"
        "sys.modules['setuptools'] = fake\n"
        "import runpy; runpy.run_path('setup.py')\n"
        "assert not {'bdtrain', 'torch'} & set(sys.modules)\n"
        "print(seen['version'], seen['python_requires'])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=repository, capture_output=True, text=True, check=False
    )
    assert result.stdout.split() == [bdtrain.__version__, ">=3.11,<3.13"], result.stderr


def test_every_requirement_has_a_pinned_version_inside_its_range(repository: Path) -> None:
    pinned = pins(repository)
    left_to_the_machine = {"flash-attn"}
    for requirement in requirements(repository):
        name = re.sub(r"[-_.]+", "-", requirement.name).lower()
        if name not in left_to_the_machine:
            assert requirement.specifier.contains(pinned[name]), f"{requirement} against {pinned[name]}"


def test_the_stated_ranges_of_the_frameworks(repository: Path) -> None:
    ranges = {requirement.name: requirement.specifier for requirement in requirements(repository)}
    for name, inside, outside in [
        ("torch", ["2.11.0", "2.12.1", "2.13.0"], ["2.10.0", "2.14.0"]),
        ("deepspeed", ["0.19.8"], ["0.19.7", "0.20.0"]),
        ("megatron-core", ["0.16.1", "0.19.0"], ["0.16.0", "0.20.0"]),
        ("sentencepiece", ["0.2.3"], ["0.2.0", "0.3.0"]),
    ]:
        assert all(ranges[name].contains(version) for version in inside), name
        assert not any(ranges[name].contains(version) for version in outside), name


def tracked_texts(repository: Path) -> dict[str, str]:
    """Every text file that git tracks."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=repository, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip("not a git checkout")
    texts = {}
    for name in listing.stdout.decode().split("\0"):
        path = repository / name
        if name and path.is_file() and b"\0" not in (content := path.read_bytes()):
            texts[name] = content.decode("utf-8")
    return texts


def test_every_extra_that_is_named_exists(repository: Path) -> None:
    extras = setup_value(repository, "EXTRAS")
    assert isinstance(extras, dict)
    named = {}
    for name, text in tracked_texts(repository).items():
        if name.startswith("tests/"):
            continue  # their extras may be made up
        for words in re.findall(r"(?:--extras |bdtrain\[|\.\[)([a-z0-9]+(?:,[a-z0-9]+)*)(?=[\]\s])", text):
            named.update(dict.fromkeys(words.split(","), name))
    assert {"dev", "flash"} <= set(named), "what the Makefile and setup.py name is found"
    assert set(named) <= set(extras), named


def test_committed_files_name_no_package_host(repository: Path) -> None:
    # Which index pip asks is the machine's business.
    host = re.compile(r"pypi[.]org|python[h]osted|download[.]pytorch")  # does not match itself
    texts = tracked_texts(repository)
    assert {"Makefile", "setup.py", "README.md"} <= set(texts)
    assert [name for name, text in texts.items() if host.search(text)] == []


def make_python(folder: Path, name: str, body: str) -> Path:
    """A fake interpreter."""
    path = folder / name
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def make(repository: Path, *arguments: str, path: str) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": path, "HOME": "/nonexistent"}
    command = ["/usr/bin/make", "-f", str(repository / "Makefile"), *arguments]
    # Away from the repository, so that its .venv is not the Python that is found.
    return subprocess.run(
        command, cwd=path.split(":")[0], env=environment, capture_output=True, text=True, check=False
    )


@pytest.mark.skipif(
    not Path("/usr/bin/make").exists(), reason="needs /usr/bin/make: the PATH of the test is faked"
)
def test_a_wrong_python_gives_one_message_with_the_fix(repository: Path, tmp_path: Path) -> None:
    for name in ("python3.11", "python3.12"):
        # What a version manager leaves behind: a name that fails when called.
        make_python(tmp_path, name, "echo not installed >&2; exit 127")
    for name in ("python3", "python"):
        make_python(tmp_path, name, '[ "$1" = --version ] && echo Python 3.9.1 && exit 0; exit 1')
    result = make(repository, "test", path=f"{tmp_path}:/usr/bin:/bin")
    message = [line for line in result.stderr.splitlines() if not line.startswith("make")]
    assert result.returncode == 2
    assert message == [
        "bdtrain needs Python 3.11 or 3.12 with its venv module; found: Python 3.9.1. Install one and name "
        "it: PYTHON=python3.11 make test"
    ]
    assert result.stdout == ""


@pytest.mark.skipif(
    not Path("/usr/bin/make").exists(), reason="needs /usr/bin/make: the PATH of the test is faked"
)
def test_the_first_python_that_fits_is_taken(repository: Path, tmp_path: Path) -> None:
    make_python(tmp_path, "python3.11", "exit 127")
    make_python(tmp_path, "python3.12", '[ "$1" = -c ] && exit 0; echo "took 3.12: $@"; exit 9')
    result = make(repository, "env-dev", "TORCH=cpu", path=f"{tmp_path}:/usr/bin:/bin")
    assert "took 3.12: tools/set_up_venv.py --torch cpu --extras dev" in result.stdout
    assert result.returncode != 0
