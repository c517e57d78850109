"""What a test of bdtrain, or of an extension of it, needs: process groups of one and a tiny model."""

from __future__ import annotations

from bdtrain.testing.groups import single_process_groups
from bdtrain.testing.tiny import tiny_model_config

__all__ = ["single_process_groups", "tiny_model_config"]
