"""Megatron's grid under the names that DeepSpeed asks for.

"Model parallel" is tp x pp here: DeepSpeed sums squared gradient norms and overflow flags over it. There
is on purpose no name with "sequence" in it: DeepSpeed switches to its own sequence parallelism when it finds
one.
"""

from __future__ import annotations

import torch.distributed as dist
from megatron.core import parallel_state


class MegatronGrid:
    """The ``mpu`` argument of ``deepspeed.initialize``."""

    get_tensor_model_parallel_rank = staticmethod(parallel_state.get_tensor_model_parallel_rank)
    get_tensor_model_parallel_world_size = staticmethod(parallel_state.get_tensor_model_parallel_world_size)
    get_tensor_model_parallel_group = staticmethod(parallel_state.get_tensor_model_parallel_group)
    get_tensor_model_parallel_src_rank = staticmethod(parallel_state.get_tensor_model_parallel_src_rank)
    get_pipeline_model_parallel_rank = staticmethod(parallel_state.get_pipeline_model_parallel_rank)
    get_pipeline_model_parallel_world_size = staticmethod(
        parallel_state.get_pipeline_model_parallel_world_size
    )
    get_pipeline_model_parallel_group = staticmethod(parallel_state.get_pipeline_model_parallel_group)

    def get_data_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold the same parameters and other data."""
        return parallel_state.get_data_parallel_group(with_context_parallel=True)

    def get_data_parallel_rank(self) -> int:
        """Rank inside the data-parallel group."""
        return dist.get_rank(self.get_data_parallel_group())

    def get_data_parallel_world_size(self) -> int:
        """Size of the data-parallel group."""
        return dist.get_world_size(self.get_data_parallel_group())

    def get_data_parallel_group_ranks(self) -> list[int]:
        """Global ranks of the data-parallel group."""
        return dist.get_process_group_ranks(self.get_data_parallel_group())

    def get_model_parallel_group(self) -> dist.ProcessGroup:
        """Ranks that hold one copy of the model between them."""
        return parallel_state.get_model_parallel_group()

    def get_model_parallel_rank(self) -> int:
        """Rank inside the model-parallel group."""
        return dist.get_rank(self.get_model_parallel_group())

    def get_model_parallel_world_size(self) -> int:
        """Size of the model-parallel group."""
        return dist.get_world_size(self.get_model_parallel_group())
