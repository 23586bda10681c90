"""The selective mixers of transformers whose state can have a size of its own: one row a family."""

from __future__ import annotations

from typing import NamedTuple


class StockFamily(NamedTuple):
    """
    What transformers calls the parts of one family.

    Args:
        mixer (`str`): Name of the mixer's class.
        module (`str`): Folder of the model in `transformers.models`.
        config (`str`): Name of the configuration's class.
        config_size_name (`str`): The configuration's name for the state size.
        kind (`str`): `"folded"` (B and C are linear in the input), `"normed"` (norms follow the projections of B and C)
            or `"multi_head"` (the form of Mamba-2).
        norm (`str`, *optional*): Name of the class of the norms of B and C.
        has_fused_training (`bool`, *optional*, defaults to `False`): Whether the mixer trains through one kernel for
            all of its steps, which knows no mixing.
    """

    mixer: str
    module: str
    config: str
    config_size_name: str
    kind: str
    norm: str | None = None
    has_fused_training: bool = False

    @property
    def modeling(self) -> str:
        """The module with the classes of the mixer and of its norms."""
        return f"transformers.models.{self.module}.modeling_{self.module}"


# By the names that `hf_compressm.architectures.families` gives them.
STOCK_FAMILIES = {
    "bamba": StockFamily("BambaMixer", "bamba", "BambaConfig", "mamba_d_state", "multi_head"),
    "falcon_h1": StockFamily("FalconH1Mixer", "falcon_h1", "FalconH1Config", "mamba_d_state", "multi_head"),
    "falcon_mamba": StockFamily(
        "FalconMambaMixer",
        "falcon_mamba",
        "FalconMambaConfig",
        "state_size",
        "normed",
        norm="FalconMambaWeightlessRMSNorm",
        has_fused_training=True,
    ),
    "granite_moe_hybrid": StockFamily(
        "GraniteMoeHybridMambaLayer", "granitemoehybrid", "GraniteMoeHybridConfig", "mamba_d_state", "multi_head"
    ),
    "jamba": StockFamily("JambaMambaMixer", "jamba", "JambaConfig", "mamba_d_state", "normed", "JambaRMSNorm"),
    "mamba2": StockFamily("Mamba2Mixer", "mamba2", "Mamba2Config", "state_size", "multi_head"),
    "mamba": StockFamily("MambaMixer", "mamba", "MambaConfig", "state_size", "folded"),
    "nemotron_h": StockFamily("NemotronHMamba2Mixer", "nemotron_h", "NemotronHConfig", "ssm_state_size", "multi_head"),
    "zamba2": StockFamily("Zamba2MambaMixer", "zamba2", "Zamba2Config", "mamba_d_state", "multi_head"),
    "zamba": StockFamily("ZambaMambaMixer", "zamba", "ZambaConfig", "mamba_d_state", "folded"),
}


def family_of(name: str) -> StockFamily | None:
    """The row of a mixer, norm or configuration of transformers, by the name of its class; None where there is none."""
    return next((row for row in STOCK_FAMILIES.values() if name in (row.mixer, row.norm, row.config)), None)


def family_of_mixer(mixer: type) -> StockFamily | None:
    """The row of a mixer's class, or of the stock one that it derives from; None where there is none."""
    names = {base.__name__ for base in mixer.__mro__}
    return next((row for row in STOCK_FAMILIES.values() if row.mixer in names), None)
