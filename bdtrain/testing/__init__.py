"""What a test of bdtrain, or of an extension of it, needs: process groups, several ranks, a tiny model.

Light to import: torch is loaded when a function needs it.
"""

from __future__ import annotations

from bdtrain.testing.groups import single_process_groups
from bdtrain.testing.ranks import RankFailure, run_ranks
from bdtrain.testing.tiny import tiny_model_config

__all__ = ["RankFailure", "run_ranks", "single_process_groups", "tiny_model_config"]
