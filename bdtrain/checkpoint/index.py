"""The fragments of a training checkpoint: which rank wrote which stretch of which parameter, and where.

Each writing rank has two files, ``rank-00000.safetensors`` with its numbers and ``rank-00000.json`` that says
what they are. A stretch lies in the file once a kind ("master", "exp_avg", ...), under ``kind/name@start``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bdtrain.checkpoint.slices import Cut, make_cut
from bdtrain.checkpoint.tensors import TensorSource
from bdtrain.errors import CheckpointError, ShapeError
from bdtrain.parallel.fragments import StateFragment


@dataclass(frozen=True)
class Piece:
    """A saved stretch.

    Attributes:
        start: first element in the flattened shard of its tensor-parallel rank.
        count: elements.
        file: name of the file that holds it.
    """

    start: int
    count: int
    file: str


@dataclass
class SavedParameter:
    """What a checkpoint holds of one parameter.

    Attributes:
        name: global name.
        full_shape: of the serial tensor.
        partition_dim: dimension that tensor parallelism cut, None for a replicated parameter.
        partition_stride: matrices stacked along it.
        tp_size: tensor-parallel ranks that shared it; 1 for a replicated parameter.
        kinds: what was kept of each element, sorted.
        pieces: tensor-parallel rank to its stretches, in order once ``find_problems`` has passed.
    """

    name: str
    full_shape: tuple[int, ...]
    partition_dim: int | None
    partition_stride: int
    tp_size: int
    kinds: tuple[str, ...]
    pieces: dict[int, list[Piece]] = field(default_factory=dict)

    @property
    def numel(self) -> int:
        """Elements of the serial tensor."""
        return math.prod(self.full_shape)

    def cut(self) -> Cut:
        """How it was cut.

        Raises:
            ShapeError: if the shape cannot be cut so.
        """
        return make_cut(self.full_shape, self.partition_dim, self.partition_stride, self.tp_size)


def tensor_key(kind: str, name: str, start: int) -> str:
    """Key of a stretch in its file."""
    return f"{kind}/{name}@{start}"


def written_fragments(fragments: Iterable[StateFragment]) -> list[StateFragment]:
    """The fragments that this rank writes: replicated parameters are left to tensor-parallel rank 0."""
    return [
        fragment
        for fragment in fragments
        if fragment.count and (fragment.partition_dim is not None or fragment.tp_rank == 0)
    ]


def fragment_bytes(fragments: Iterable[StateFragment]) -> int:
    """Bytes of the numbers of some fragments."""
    return sum(4 * fragment.count * len(fragment.tensors) for fragment in fragments)


def tensor_sources(fragments: Iterable[StateFragment]) -> list[TensorSource]:
    """What a rank's tensor file holds, in order."""
    return [
        TensorSource(tensor_key(kind, fragment.name, fragment.start), (fragment.count,), tensor.detach)
        for fragment in fragments
        for kind, tensor in fragment.tensors.items()
    ]


def index_text(fragments: Iterable[StateFragment], file: str) -> str:
    """What a rank's index file holds.

    Args:
        fragments: those the rank writes.
        file: name of its tensor file.
    """
    records = [
        {
            "name": fragment.name,
            "full_shape": list(fragment.full_shape),
            "partition_dim": fragment.partition_dim,
            "partition_stride": fragment.partition_stride,
            "tp_rank": fragment.tp_rank,
            "tp_size": fragment.tp_size,
            "start": fragment.start,
            "count": fragment.count,
            "kinds": list(fragment.tensors),
        }
        for fragment in fragments
    ]
    lines = ",\n  ".join(json.dumps(record) for record in records)
    return f'{{"file": {json.dumps(file)}, "fragments": [\n  {lines}\n]}}\n'


def read_indices(paths: Sequence[Path]) -> dict[str, SavedParameter]:
    """Merge the index files of all ranks.

    Args:
        paths: the index files, in the order of the ranks.

    Returns:
        Parameters by name, in the order in which they were written.

    Raises:
        CheckpointError: if one cannot be read, or together they do not hold every element once.
    """
    parameters: dict[str, SavedParameter] = {}
    problems: list[str] = []
    for path in paths:
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            file = str(content["file"])
            for record in content["fragments"]:
                _add_record(parameters, record, file, problems)
        except OSError as error:
            raise CheckpointError(f"{path} cannot be read ({error.strerror or error})") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{path} is not an index of fragments ({error!r}); choose another checkpoint"
            ) from error
    for parameter in parameters.values():
        problems += find_problems(parameter)
    if problems:
        folder = paths[0].parent
        raise CheckpointError(f"{folder} does not hold every parameter once:\n  " + shorten(problems))
    return parameters


def find_problems(parameter: SavedParameter) -> list[str]:
    """Gaps and overlaps of the stretches of a parameter, which are put in order."""
    try:
        shard = parameter.cut().shard
    except ShapeError as error:
        return [f"{parameter.name}: {error}"]
    problems = []
    for rank in range(parameter.tp_size):
        end = 0
        pieces = parameter.pieces.get(rank, [])
        pieces.sort(key=lambda piece: piece.start)
        # A piece of zero elements past the end closes the last gap.
        for piece in [*pieces, Piece(shard, 0, "")]:
            if piece.start != end:
                what = "missing" if piece.start > end else "too many"
                low, high = sorted((piece.start, end))
                problems.append(f"{parameter.name}: elements {low} to {high} of tp rank {rank} are {what}")
            end = max(end, piece.start + piece.count)
    for rank in sorted(set(parameter.pieces) - set(range(parameter.tp_size))):
        problems.append(f"{parameter.name}: tp rank {rank} of {parameter.tp_size}")
    return problems


def shorten(problems: Sequence[str], shown: int = 40) -> str:
    """Some lines of a long list, and how many more there are."""
    more = [f"and {len(problems) - shown} more"] if len(problems) > shown else []
    return "\n  ".join([*problems[:shown], *more])


def _add_record(
    parameters: dict[str, SavedParameter], record: Mapping[str, Any], file: str, problems: list[str]
) -> None:
    dim = record["partition_dim"]
    described = SavedParameter(
        name=str(record["name"]),
        full_shape=tuple(int(size) for size in record["full_shape"]),
        partition_dim=None if dim is None else int(dim),
        partition_stride=int(record["partition_stride"]),
        tp_size=1 if dim is None else int(record["tp_size"]),
        kinds=tuple(sorted(record["kinds"])),
    )
    known = parameters.setdefault(described.name, described)
    if _description(known) != _description(described):
        problems.append(f"{described.name}: {file} describes it in another way than other ranks")
        return
    rank = 0 if dim is None else int(record["tp_rank"])
    piece = Piece(int(record["start"]), int(record["count"]), file)
    known.pieces.setdefault(rank, []).append(piece)


def _description(parameter: SavedParameter) -> tuple[object, ...]:
    return (
        parameter.full_shape,
        parameter.partition_dim,
        parameter.partition_stride,
        parameter.tp_size,
        parameter.kinds,
    )
