"""Loading the state of training under any layout: from the stretches that were saved into the live ones."""

from __future__ import annotations

import json
import re
from bisect import bisect_right
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from bdtrain.checkpoint.communicator import Communicator, OneProcess
from bdtrain.checkpoint.folders import CONFIG, STATE, TOKENIZER
from bdtrain.checkpoint.index import SavedParameter, read_indices, shorten, tensor_key
from bdtrain.checkpoint.manifest import TRAINING_FORMAT, read_manifest
from bdtrain.checkpoint.slices import Cut, make_cut, rectangles
from bdtrain.config import RunConfig, load_config
from bdtrain.errors import CheckpointError, ShapeError
from bdtrain.parallel.fragments import MASTER, StateFragment

EMA = "ema"
"""Kind of the averaged weights."""

_INDEX = re.compile(r"rank-\d{5,}\.json")


@dataclass(frozen=True)
class LoadReport:
    """What loading did; the same on every rank.

    Attributes:
        average_started: the run keeps averaged weights, the checkpoint has none: they begin at the weights.
        average_ignored: the checkpoint has averaged weights and the run keeps none.
    """

    average_started: bool
    average_ignored: bool


@dataclass(frozen=True)
class TrainingState:
    """A training checkpoint on disk, open for reading.

    Attributes:
        folder: where it is.
        state: everything that is not a tensor.
        parameters: what is there of each parameter, by name.
        run_uid: of the run that wrote it.
        step: batches taken.
        world_size: ranks that wrote it.
        tokenizer: path of the tokenizer, None for synthetic data.
    """

    folder: Path
    state: dict[str, Any]
    parameters: Mapping[str, SavedParameter]
    run_uid: str
    step: int
    world_size: int
    tokenizer: Path | None

    @classmethod
    def open(cls, folder: Path) -> TrainingState:
        """Read everything but the tensors.

        The content is not compared with the manifest; whoever chose the folder has done that.

        Raises:
            CheckpointError: if it is not a training checkpoint or parts of it are missing.
        """
        manifest = read_manifest(folder)
        if manifest.format != TRAINING_FORMAT:
            raise CheckpointError(
                f"{folder} holds a trained model and no optimizer state; give a folder of "
                "checkpoints/step-..., or start a new run from its weights"
            )
        indices = sorted(name for name in manifest.files if _INDEX.fullmatch(name))
        parameters = read_indices([folder / name for name in indices])
        if not parameters:
            raise CheckpointError(f"{folder} holds no parameter; choose another checkpoint")
        files = {piece.file for p in parameters.values() for row in p.pieces.values() for piece in row}
        if unlisted := files - set(manifest.files):
            raise CheckpointError(f"{folder}: {sorted(unlisted)[0]!r} is not in its manifest")
        try:
            state = json.loads((folder / STATE).read_text(encoding="utf-8"))
            return cls(
                folder=folder,
                state=dict(state),
                parameters=parameters,
                run_uid=str(manifest.facts["run_uid"]),
                step=int(manifest.facts["step"]),
                world_size=int(manifest.facts["world_size"]),
                tokenizer=folder / TOKENIZER if TOKENIZER in manifest.files else None,
            )
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"{folder}: {STATE} or the manifest cannot be used ({error!r})") from error

    @property
    def config(self) -> RunConfig:
        """The configuration of the run that wrote it.

        Raises:
            ConfigError: if it is not one this version knows.
        """
        return load_config([self.folder / CONFIG], []).config

    @property
    def kinds(self) -> frozenset[str]:
        """Kinds that are there of every parameter."""
        return frozenset.intersection(*(frozenset(p.kinds) for p in self.parameters.values()))

    def full_tensor(self, name: str, kind: str) -> Tensor:
        """One kind of one parameter as the serial model has it.

        Returns:
            float32, [full_shape].

        Raises:
            CheckpointError: if it is not there or cannot be read.
        """
        parameter = self.parameters.get(name)
        if parameter is None or kind not in parameter.kinds:
            raise CheckpointError(f"{self.folder} has no {kind!r} of {name!r}")
        with _Reader(self.folder) as reader:
            whole = make_cut(parameter.full_shape, None, 1, 1)
            flat = reader.stretch(parameter, kind, whole, 0, 0, parameter.numel)
        return flat.view(parameter.full_shape)

    def load_into(
        self, fragments: Sequence[StateFragment], communicator: Communicator | None = None
    ) -> LoadReport:
        """Overwrite live state with what was saved, whatever layouts the two have.

        Args:
            fragments: what this rank owns; the views are overwritten, one at a time.
            communicator: the ranks that together own the model; all must call this. None for one process.

        Raises:
            CheckpointError: if any rank's parameters are not those of the checkpoint: one list, the same on
                all ranks, and nothing has been copied. Also if a rank cannot read a file; then live state is
                half old and half new.
        """
        communicator = communicator or OneProcess()
        live = [fragment for fragment in fragments if fragment.count]
        report = self._check(live, communicator)
        failure: CheckpointError | None = None
        try:
            with _Reader(self.folder) as reader:
                for fragment in live:
                    self._fill(fragment, reader)
        except CheckpointError as error:
            failure = error
        answers = communicator.gather_objects(None if failure is None else str(failure))
        errors = [f"rank {rank}: {answer}" for rank, answer in enumerate(answers) if answer is not None]
        if errors:
            raise CheckpointError("; ".join(errors[:4])) from failure
        return report

    @torch.no_grad()
    def _fill(self, fragment: StateFragment, reader: _Reader) -> None:
        """Overwrite one live fragment."""
        parameter = self.parameters[fragment.name]
        cut = _live_cut(fragment)
        # A replicated parameter is one shard, whichever rank asks.
        rank = fragment.tp_rank if cut.size > 1 else 0
        for kind, view in fragment.tensors.items():
            source = kind if kind in parameter.kinds else MASTER
            view.copy_(reader.stretch(parameter, source, cut, rank, fragment.start, fragment.count))

    def _check(self, live: Sequence[StateFragment], communicator: Communicator) -> LoadReport:
        """Compare the live parameters of all ranks with the saved ones."""
        numbers = {name: number for number, name in enumerate(self.parameters)}
        problems, found, started, ignored = [], set(), False, False
        for fragment in live:
            parameter = self.parameters.get(fragment.name)
            if parameter is None:
                problems.append(f"{fragment.name} is not in the checkpoint")
                continue
            found.add(numbers[fragment.name])
            problems += _differences(fragment, parameter)
            started |= EMA in fragment.tensors and EMA not in parameter.kinds
            ignored |= EMA not in fragment.tensors and EMA in parameter.kinds
        answers = communicator.gather_objects([problems, sorted(found), started, ignored])
        everywhere = {number for answer in answers for number in answer[1]}
        unknown = [
            f"{name} is in the checkpoint and not in the model"
            for name, number in numbers.items()
            if number not in everywhere
        ]
        # Ranks that hold parts of one parameter all complain of it.
        lines = list(dict.fromkeys([line for answer in answers for line in answer[0]] + unknown))
        if lines:
            raise CheckpointError(
                f"{self.folder} was saved by another model or optimizer; continue with the configuration "
                f"that made it ({self.folder / CONFIG}), or start a new run:\n  " + shorten(lines)
            )
        return LoadReport(
            average_started=any(answer[2] for answer in answers),
            average_ignored=any(answer[3] for answer in answers),
        )


class _Reader:
    """The open tensor files of a checkpoint."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files: dict[str, Any] = {}

    def __enter__(self) -> _Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self._files.clear()

    def stretch(
        self, parameter: SavedParameter, kind: str, live: Cut, live_rank: int, start: int, count: int
    ) -> Tensor:
        """Elements ``start`` to ``start + count`` of a live shard, on the CPU, [count]."""
        live, saved, pieces = rectangles(live, live_rank, start, count, parameter.cut())
        result: Tensor | None = None
        for piece in pieces:
            first, last = piece.rows
            begin, end = piece.saved
            if last - first == 1:
                block = self._saved(
                    parameter, kind, piece.rank, first * saved.row + begin, first * saved.row + end
                )
                if block.numel() == count:
                    return block
                offset = first * live.row + piece.live[0] - start
                result = torch.empty(count) if result is None else result
                result[offset : offset + block.numel()] = block
            else:
                block = self._saved(parameter, kind, piece.rank, first * saved.row, last * saved.row)
                result = torch.empty(count) if result is None else result
                rows = result[first * live.row - start : last * live.row - start].view(-1, live.row)
                rows[:, piece.live[0] : piece.live[1]] = block.view(-1, saved.row)[:, begin:end]
        assert result is not None, "a stretch of no elements"
        return result

    def _saved(self, parameter: SavedParameter, kind: str, rank: int, begin: int, end: int) -> Tensor:
        """Elements of a saved shard, from the pieces that hold them, [end - begin]."""
        pieces = parameter.pieces[rank]
        number = bisect_right(pieces, begin, key=lambda piece: piece.start) - 1
        parts = []
        while begin < end:
            piece = pieces[number]
            stop = min(end, piece.start + piece.count)
            key = tensor_key(kind, parameter.name, piece.start)
            parts.append(self._read(piece.file, key, begin - piece.start, stop - piece.start))
            begin, number = stop, number + 1
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, file: str, key: str, begin: int, end: int) -> Tensor:
        path = self._folder / file
        try:
            if file not in self._files:
                self._files[file] = safe_open(path, framework="pt", device="cpu")
            values: Tensor = self._files[file].get_slice(key)[begin:end]
        except (OSError, IndexError, SafetensorError) as error:
            raise CheckpointError(f"{path}: {key} cannot be read ({error})") from error
        if values.dtype != torch.float32 or values.shape != (end - begin,):
            raise CheckpointError(f"{path}: {key} is not what the index says")
        return values


def _live_cut(fragment: StateFragment) -> Cut:
    return make_cut(fragment.full_shape, fragment.partition_dim, fragment.partition_stride, fragment.tp_size)


def _differences(fragment: StateFragment, parameter: SavedParameter) -> Iterable[str]:
    """Why a live fragment cannot be filled from a saved parameter."""
    name = fragment.name
    if tuple(fragment.full_shape) != parameter.full_shape:
        yield f"{name} has shape {parameter.full_shape}, the model's is {tuple(fragment.full_shape)}"
        return
    try:
        rectangles(_live_cut(fragment), 0, 0, 0, parameter.cut())
    except ShapeError as error:
        yield f"{name}: {error}"
    wanted, there = set(fragment.tensors) - {EMA}, set(parameter.kinds) - {EMA}
    if wanted - there:
        yield f"{name} has no {', '.join(sorted(wanted - there))}"
    if there - wanted:
        yield f"{name} has {', '.join(sorted(there - wanted))}, which this run does not keep"
