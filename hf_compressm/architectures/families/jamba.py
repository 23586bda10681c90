"""Jamba: transformers' `JambaMambaMixer`, a Mamba mixer with trained norms, between attention and expert layers.

Source of the layer: Lieber et al., 2024, "Jamba: A Hybrid Transformer-Mamba Language Model" (arXiv 2403.19887).
"""

from __future__ import annotations

from ..registry import register
from ..scans.selective import register_selective_scan
from .normed_mamba import NormedMambaLayer


@register
class JambaLayer(NormedMambaLayer):
    """A Jamba Mamba mixer, seen as a state-space system."""

    family = "jamba"
    mixer_names = frozenset({"JambaMambaMixer"})
    config_size_name = "mamba_d_state"


register_selective_scan("transformers.models.jamba.modeling_jamba")
