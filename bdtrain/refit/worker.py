"""A process of the re-fit: loads a snapshot once, then measures shards of held-out rows."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from bdtrain.data.build import build_source
from bdtrain.data.loader import ValidationSet
from bdtrain.data.source import Source
from bdtrain.diffusion.build import build_objective
from bdtrain.diffusion.plan import evaluation_plan
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.errors import RefitError
from bdtrain.model.build import DTYPES
from bdtrain.parallel.groups import init_groups, prepare_deepspeed, private_store
from bdtrain.parallel.launch_environment import Launch
from bdtrain.refit.gradients import report_gradients
from bdtrain.refit.measure import measure_blocks
from bdtrain.refit.request import RefitRequest
from bdtrain.refit.search import SearchResult
from bdtrain.refit.snapshot import data_section
from bdtrain.validation.evaluate import load_saved

if TYPE_CHECKING:
    from megatron.core.process_groups_config import ProcessGroupCollection


class RefitWorker:
    """Measures shards of a request; two workers of one size return the same bits for the same shard.

    Args:
        request: the measurement, or its ``to_dict``.
        launch: who this process is among those that share the model (tensor parallelism), all of which make
            the same calls; None for a model of its own.
        listener: on the first of them a socket that listens at the launch's address; taken over.

    Raises:
        CheckpointError: if the snapshot is damaged.
        ConfigError: if the model cannot be cut over so many processes.
        DataError: if the held-out text cannot be read.
        RefitError: if the device is not there.
    """

    def __init__(
        self,
        request: RefitRequest | Mapping[str, Any],
        launch: Launch | None = None,
        listener: int | None = None,
    ) -> None:
        self.request = request if isinstance(request, RefitRequest) else RefitRequest.from_dict(request)
        if self.request.threads is not None:
            torch.set_num_threads(self.request.threads)
        self._device = torch.device(self.request.device)
        if self._device.type == "cuda" and not torch.cuda.is_available():
            raise RefitError(
                "the re-fit is to run on a GPU and this process sees none; give it one that is there "
                "(refit.worker_gpus on Ray, refit.gpu beside a trainer), or let it run on CPUs"
            )
        self._saved, self._model = load_saved(
            Path(self.request.snapshot),
            device=self._device,
            dtype=DTYPES[self.request.precision],
            groups=None if launch is None else join_group(launch, listener),
        )
        self._parts = self.request.parts
        section = data_section(self._saved.config, self.request.data_path)
        self._source: Source = build_source(section, split="valid", seed=self._saved.config.run.seed)
        self._data = section

    def measure(self, shard: int) -> dict[int, BlockRecords]:
        """Measure one shard; of processes that share the model, each gets all records.

        Args:
            shard: its number in ``request.parts``.

        Returns:
            Its records under its block size.
        """
        part, request = self._parts[shard], self.request
        rows = request.sequences[request.block_sizes.index(part.block_size)]
        settings = self._saved.config.diffusion.model_copy(update={"block_size": part.block_size})
        objective = build_objective(
            settings, self._data, self._source.tokenizer_info, evaluation_plan(part.block_size)
        )
        records = measure_blocks(
            self._model,
            objective,
            ValidationSet(self._source, max_sequences=rows, part=(part.start, part.stop)),
            batch_size=request.batch_sequences,
            seed=request.seed,
            device=self._device,
        )
        return {part.block_size: records}

    def report_gradients(self, results: Mapping[int, SearchResult]) -> dict[str, Any]:
        """What ``bdtrain.refit.gradients.report_gradients`` says of these searches."""
        return report_gradients(
            self._model,
            self._saved.config.diffusion,
            self._data,
            self._source,
            results,
            batch_size=self.request.batch_sequences,
            seed=self.request.seed,
            device=self._device,
        )


def join_group(launch: Launch, listener: int | None) -> ProcessGroupCollection:
    """Meet the processes that share the model with this one.

    Args:
        launch: who this process is among them.
        listener: as ``RefitWorker`` takes it.

    Returns:
        Megatron's process groups.
    """
    prepare_deepspeed()
    return init_groups(launch, tp=launch.world_size, store=private_store(launch, listener))
