"""Training objectives: the noise of a batch, the rows of output that it needs, and the loss of a row."""

from bdtrain.diffusion.objectives.base import Corrupted, Objective
from bdtrain.diffusion.objectives.build import make_objective
from bdtrain.diffusion.objectives.vocab import DenseVocabView, VocabView

__all__ = ["Corrupted", "DenseVocabView", "Objective", "VocabView", "make_objective"]
