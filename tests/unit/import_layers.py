"""Who may import whom, read from the source text: nothing is imported, so it costs milliseconds.

The table follows the rooms: each may import the ones above it, and some packages are kept out of some rooms.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

KERNELS = "bdtrain_kernels"

_MIDDLE = ("config", "diffusion", "data", "model", "parallel", "tracking", KERNELS)

UPWARD: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "errors": (),
        "files": (),
        "config": (),
        "diffusion": (),
        "data": ("config", "diffusion.keyed"),
        "model": ("config", "diffusion", KERNELS),
        "parallel": ("model", "config", "diffusion", KERNELS),
        "tracking": ("config",),
        "checkpoint": _MIDDLE,
        "validation": (*_MIDDLE, "checkpoint"),
        "export": (*_MIDDLE, "checkpoint", "validation"),
        "refit": (*_MIDDLE, "checkpoint", "validation", "export"),
        "train": (*_MIDDLE, "checkpoint", "validation", "export", "refit"),
        "testing": (*_MIDDLE, "checkpoint", "validation", "export", "refit", "train"),
    }
)
"""Room to the rooms that it may import, ``errors``, ``files`` and itself aside."""

NEVER = {
    "errors": ("torch", "numpy", "megatron", "deepspeed", "ray", "mlflow"),
    "files": ("torch", "numpy", "megatron", "deepspeed", "ray", "mlflow"),
    "config": ("torch", "numpy", "megatron", "deepspeed", "ray", "mlflow"),
    "diffusion": ("torch.distributed", "megatron", "deepspeed", "ray", "mlflow"),
    "data": ("torch.distributed", "megatron", "deepspeed", "ray", "mlflow"),
    "model": ("torch.distributed", "deepspeed", "ray", "mlflow"),
    "train": ("ray", "bdtrain.refit.ray_backend"),
    KERNELS: ("bdtrain", "megatron", "deepspeed", "ray", "mlflow"),
}
"""Packages that a room does not import even inside a function."""

HOMES = {
    "ray": ("bdtrain/refit/ray_backend.py",),
    "mlflow": ("bdtrain/tracking/mlflow.py",),
    "wandb": ("bdtrain/tracking/wandb.py",),
    "matplotlib": ("bdtrain/tracking/pictures.py",),
}
"""Files outside of which a package is not imported at all."""

LAZY = ("ray", "mlflow", "triton", "flash_attn", "flash_attn_interface", "wandb", "matplotlib")
"""Not needed by every run: imported inside functions, or at the top of a file that is itself imported so."""

LAZY_HOMES = {
    "triton": (f"kernels/{KERNELS}/",),
    "flash_attn": (f"kernels/{KERNELS}/",),
    "flash_attn_interface": (f"kernels/{KERNELS}/",),
    "ray": ("bdtrain/refit/ray_backend.py",),
    "mlflow": (),
    "wandb": (),
    "matplotlib": (),
}
"""Where a top-level import of such a package is right.

A kernel's file that needs one is named ``triton*`` or ``flash*``.
"""

SCRIPTS = ("launchers", "tools")


@dataclass(frozen=True)
class Import:
    """One imported name: ``from a import b`` is ``a.b``."""

    name: str
    line: int
    top_level: bool
    for_types_only: bool


def imports_of(source: str, package: str) -> Iterator[Import]:
    """All imports of a module, relative ones resolved.

    Args:
        source: its text.
        package: dotted name of the package that contains the module.
    """
    yield from _walk(ast.parse(source), package, top_level=True, for_types_only=False)


def _walk(node: ast.AST, package: str, *, top_level: bool, for_types_only: bool) -> Iterator[Import]:
    if isinstance(node, ast.Import):
        for alias in node.names:
            yield Import(alias.name, node.lineno, top_level, for_types_only)
        return
    if isinstance(node, ast.ImportFrom):
        base = node.module or ""
        if node.level:
            parts = package.split(".")
            base = ".".join([*parts[: len(parts) - node.level + 1], *([base] if base else [])])
        for alias in node.names:
            yield Import(
                base if alias.name == "*" else f"{base}.{alias.name}", node.lineno, top_level, for_types_only
            )
        return
    inner = top_level and not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda))
    if isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING"):
        for child in node.body:
            yield from _walk(child, package, top_level=inner, for_types_only=True)
        for child in node.orelse:
            yield from _walk(child, package, top_level=inner, for_types_only=for_types_only)
        return
    for child in ast.iter_child_nodes(node):
        yield from _walk(child, package, top_level=inner, for_types_only=for_types_only)


def check_tree(root: Path) -> list[str]:
    """Breaches in a repository, as ``path:line: what``."""
    files = sorted([*root.glob("bdtrain/**/*.py"), *root.glob(f"kernels/{KERNELS}/**/*.py")])
    scripts = {path.stem for folder in SCRIPTS for path in root.glob(f"{folder}/**/*.py")}
    breaches = []
    for path in files:
        relative = path.relative_to(root).as_posix()
        module = relative.removeprefix("kernels/").removesuffix(".py").replace("/", ".")
        package = (
            module.removesuffix(".__init__") if module.endswith(".__init__") else module.rpartition(".")[0]
        )
        room = KERNELS if module.startswith(KERNELS) else [*module.split("."), ""][1]
        for found in imports_of(path.read_text(encoding="utf-8"), package):
            reason = _breach(relative, room, found, scripts)
            if reason:
                breaches.append(f"{relative}:{found.line}: {reason}")
    return breaches


def _breach(relative: str, room: str, found: Import, scripts: set[str]) -> str | None:
    """Why an import is wrong, or None."""
    name, package = found.name, found.name.split(".")[0]
    where = (
        f"bdtrain.{room}" if room not in (KERNELS, "__init__") else {"__init__": "bdtrain"}.get(room, room)
    )
    for forbidden in NEVER.get(room, ()):
        if _inside(name, forbidden) and not (found.for_types_only and forbidden == package):
            return f"{where} may not import {forbidden}"
    if package in SCRIPTS or (package in scripts and package != "bdtrain"):
        return f"nothing imports {name}: scripts are for the shell"
    if package in HOMES and relative not in HOMES[package] and not found.for_types_only:
        return f"{package} is imported in {', '.join(HOMES[package])} only"
    if package in LAZY and found.top_level and not found.for_types_only and not _lazy_home(relative, package):
        return f"{package} is imported inside functions, so that the rest works without it"
    if package == "bdtrain" and room not in (KERNELS, ""):
        return _upward(room, name, where)
    if package == KERNELS and room not in (KERNELS, "") and KERNELS not in UPWARD.get(room, ()):
        return f"{where} may not import {KERNELS}"
    return None


def _upward(room: str, name: str, where: str) -> str | None:
    if room == "__init__":
        return f"bdtrain itself imports nothing, found {name}"
    if room not in UPWARD:
        return f"{where} is no room; add it to the table"
    target = name.removeprefix("bdtrain").removeprefix(".")
    if not target or target.startswith("__"):
        return None
    allowed = {room, "errors", "files", *UPWARD[room]} - {KERNELS}
    if any(_inside(target, one) for one in allowed):
        return None
    return f"{where} may not import bdtrain.{target}"


def _inside(name: str, package: str) -> bool:
    return name == package or name.startswith(f"{package}.")


def _lazy_home(relative: str, package: str) -> bool:
    for home in LAZY_HOMES.get(package, ()):
        if relative == home:
            return True
        file = relative.rpartition("/")[2]
        if home.endswith("/") and relative.startswith(home) and file.startswith(("triton", "flash")):
            return True
    return False
