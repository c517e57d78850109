"""Settings and records for tests of sweeps and their sessions."""

import numpy as np

from bdtrain.config import RunConfig
from bdtrain.diffusion.variance import BlockRecords
from bdtrain.testing import tiny_model_config


def run_config(**refit):
    return RunConfig.model_validate(
        {
            "run": {"seed": 3},
            "model": tiny_model_config(),
            "data": {"kind": "synthetic", "seq_len": 32},
            "train": {"steps": 1, "global_batch_size": 8},
            "refit": {"mode": "clip", "bootstrap_draws": 50, "widths": [0.5, 0.8], **refit},
        }
    )


def make_records(block_size, seed):
    """Blocks whose loss rises with the share of masked tokens."""
    generator = np.random.default_rng(seed)
    count = 8 * 40
    masked = np.tile(np.arange(1, block_size + 1), count // block_size)
    return BlockRecords(
        sequence=np.repeat(np.arange(40), 8),
        maskable=np.full(count, block_size),
        masked=masked,
        nll=masked * (1 + 2 * masked / block_size) * generator.gamma(4, 0.25, count),
    )
