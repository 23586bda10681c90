"""From a layer's Gramians and a rank to a truncation: which reductor runs for which setting."""

from __future__ import annotations

import torch

from ..config import CompreSSMConfig
from ..systems import Truncation, diagonal_hankel_scores, interpolative_truncation, selection_truncation
from .gramians import LayerGramians


def truncate(gramians: LayerGramians, rank: int, config: CompreSSMConfig, seed: int = 0) -> Truncation:
    """
    Cut a layer's state to `rank` states with the configured reductor.

    Args:
        gramians ([`LayerGramians`]): The layer's Gramians, N x N.
        rank (`int`): States to keep, between 1 and N.
        config ([`CompreSSMConfig`]): Names the reductor and, for a selection, the score and the rule.
        seed (`int`, *optional*, defaults to 0): Seed of the rule `"random"`.

    Raises:
        [`~errors.TruncationError`]: the truncation failed one of its own checks.
    """
    if config.reductor == "interpolative":
        return interpolative_truncation(gramians.P, gramians.Q, rank)
    scores = (
        diagonal_hankel_scores(gramians.P, gramians.Q)
        if config.selection_score == "hankel"
        else gramians.readout_energy
    )
    generator = torch.Generator(device=scores.device).manual_seed(seed)
    return selection_truncation(scores, rank, rule=config.selection_rule, generator=generator)
