"""From the config's words to an objective."""

from __future__ import annotations

from bdtrain.diffusion.objectives.ar import Autoregressive
from bdtrain.diffusion.objectives.base import Objective
from bdtrain.diffusion.objectives.block_diffusion import BlockDiffusion
from bdtrain.diffusion.objectives.mdlm import Mdlm
from bdtrain.diffusion.plan import NoisePlan
from bdtrain.errors import ConfigError

ALGORITHMS = ("block_diffusion", "mdlm", "ar")


def make_objective(
    algo: str,
    *,
    plan: NoisePlan | None,
    mask_id: int,
    vocab_size: int,
    seq_len: int,
    isolate_documents: bool = True,
) -> Objective:
    """Build an objective.

    Args:
        algo: ``block_diffusion``, ``mdlm`` or ``ar``.
        plan: the noise plan; its block size must divide ``seq_len``, and for ``mdlm`` it is replaced by
            ``seq_len``. Not used by ``ar`` and may be None there.
        mask_id: id of [MASK].
        vocab_size: V, [MASK] included.
        seq_len: tokens per row.
        isolate_documents: blocks restart at each document of a row and nothing is seen across documents.

    Raises:
        ConfigError: if a word or a number is not allowed.
    """
    if algo not in ALGORITHMS:
        raise ConfigError(f"algo={algo!r} is unknown; choose one of {', '.join(ALGORITHMS)}")
    if algo == "ar":
        return Autoregressive(mask_id, vocab_size, isolate_documents)
    if plan is None:
        raise ConfigError(f"algo={algo!r} needs a noise plan; give one, or choose algo='ar'")
    if algo == "mdlm":
        return Mdlm(plan.with_block_size(seq_len), mask_id, vocab_size, isolate_documents)
    if seq_len % plan.block_size:
        raise ConfigError(
            f"block_size={plan.block_size} does not divide seq_len={seq_len}; choose a block size that does"
        )
    return BlockDiffusion(plan, mask_id, vocab_size, isolate_documents)
