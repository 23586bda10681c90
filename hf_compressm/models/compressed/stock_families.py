"""
The selective mixers of transformers whose state can have a size of its own: one row a family.

What follows from a row is written nowhere else: which classes and configurations can be compressed, where they are, how
a mixed layer combines its states, and what the layers of `hf_compressm.architectures.families` are recognised by.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from typing import Any, NamedTuple


class ScanCall(NamedTuple):
    """
    How a mixer of the kind `"scan"` calls its recurrence, or one step of it.

    Args:
        name (`str`): The global name in the mixer's module by which its forward pass calls it.
        write (`str`): The argument that writes to the state: B, or the keys of linear attention. Its last axis has one
            entry a state; the axis before it, one a group, where the family has groups.
        read (`str`): The argument that reads the state: C, or the queries. Its shape is that of `write`.
        decay (`str`, *optional*): The argument with the logarithm of each state's decay, where every state of a group
            has its own. Its shape is that of `write`.
    """

    name: str
    write: str
    read: str
    decay: str | None = None


class StockFamily(NamedTuple):
    """
    What transformers, or another package, calls the parts of one family.

    Args:
        mixer (`str`): Name of the mixer's class. It is built with a configuration and `layer_idx`.
        module (`str`): Folder of the model in `transformers.models`; or, with a dot in it, the module with the classes.
        config (`str`): Name of the configuration's class.
        config_size_name (`str`): The configuration's name for the state size.
        kind (`str`): How a layer gets a smaller state. `"folded"`: B and C are linear in the input, the weights hold
            it. `"normed"`: the norms of B and C combine states. `"multi_head"`: the forward pass of Mamba-2 does.
            `"scan"`: the arguments of the calls in `scans` are combined, whatever the forward pass is. `"delta_rule"`:
            so are those of gated DeltaNet, behind the norm of keys and queries. `"kimi_delta"`: and so are those of
            Kimi delta attention, whose decays are combined too. `"lightning"`: the forward pass of lightning attention
            does.
        norm (`str`, *optional*): Name of the class of the norms of B and C.
        has_fused_training (`bool`, *optional*, defaults to `False`): Whether the mixer trains through one kernel for
            all of its steps, which knows no mixing.
        size_name (`str`, *optional*, defaults to `"ssm_state_size"`): The mixer's name for the state size.
        groups_name (`str`, *optional*): The mixer's name for the number of groups of heads, each with its own B and C;
            without one there is one B and one C.
        scans (`tuple[ScanCall, ...]`, *optional*): How a mixer that keeps its own forward pass calls its recurrence.
        nested_size (`tuple[str, str]`, *optional*): A dict in the configuration, and the key in it that overrides
            `config_size_name` when the configuration is read, as original checkpoints of Kimi Linear have it.
        seeing_config (`str`, *optional*): Name of the configuration's class of models that also see, which holds the
            family's own in its `text_config`.
    """

    mixer: str
    module: str
    config: str
    config_size_name: str
    kind: str
    norm: str | None = None
    has_fused_training: bool = False
    size_name: str = "ssm_state_size"
    groups_name: str | None = None
    scans: tuple[ScanCall, ...] = ()
    nested_size: tuple[str, str] | None = None
    seeing_config: str | None = None

    @property
    def is_installed(self) -> bool:
        """Whether the installed version has the family; transformers 5.17 has not all of them."""
        if self.modeling in sys.modules:
            return True
        try:
            return importlib.util.find_spec(self.modeling) is not None
        except ModuleNotFoundError:  # nor the package around it
            return False

    @property
    def modeling(self) -> str:
        """The module with the classes of the models, the mixer and its norms."""
        return self.module if "." in self.module else f"transformers.models.{self.module}.modeling_{self.module}"

    @property
    def stem(self) -> str:
        """What the names of the family's models begin with; a text model's configuration may say so after it."""
        return self.config.removesuffix("Config").removesuffix("Text")

    @property
    def configs(self) -> tuple[str, ...]:
        """The names of the classes of configurations that build models of the family."""
        return tuple(name for name in (self.config, self.seeing_config) if name is not None)

    def model_class(self, end: str, config: str) -> Any:
        """
        The family's model class for a purpose; None where it has none.

        Args:
            end (`str`): What the class's name ends with, such as `"ForCausalLM"`.
            config (`str`): The one of `configs` that it is built with; one of the name that is built with another, as a
                model that also sees is, does not count.
        """
        found = (self.class_named(stem + end) for stem in (self.stem, self.config.removesuffix("Config")))
        return next((cls for cls in found if cls is not None and cls.config_class.__name__ == config), None)

    def class_named(self, name: str) -> Any:
        """One of the family's classes by its name; None where it has none of that name."""
        if "." not in self.module:
            found = getattr(importlib.import_module("transformers"), name, None)
            if found is not None:
                return found
        return getattr(importlib.import_module(self.modeling), name, None) if self.is_installed else None


def _multi_head(mixer: str, module: str, config: str, config_size_name: str) -> StockFamily:
    return StockFamily(mixer, module, config, config_size_name, "multi_head", groups_name="n_groups")


def _gated_delta_net(mixer: str, module: str, config: str, seeing_config: str | None = None) -> StockFamily:
    calls = ("torch_chunk_gated_delta_rule", "torch_recurrent_gated_delta_rule")
    return StockFamily(
        mixer,
        module,
        config,
        "linear_key_head_dim",
        "delta_rule",
        size_name="head_k_dim",
        groups_name="num_k_heads",
        scans=tuple(ScanCall(name, write="key", read="query") for name in calls),
        seeing_config=seeing_config,
    )


def _kimi_delta(mixer: str, module: str, config: str, **more: Any) -> StockFamily:
    calls = ("chunk_kimi_delta_attention", "recurrent_kimi_delta_attention")
    return StockFamily(
        mixer,
        module,
        config,
        "linear_head_dim",
        "kimi_delta",
        size_name="head_dim",
        groups_name="num_heads",
        scans=tuple(ScanCall(name, write="key", read="query", decay="g") for name in calls),
        **more,
    )


# Original checkpoints have the size of a head there.
_NESTED_SIZE = ("linear_attn_config", "head_dim")

# By the names that `hf_compressm.architectures.families` gives them.
STOCK_FAMILIES = {
    "bailing_hybrid": _kimi_delta("BailingHybridDeltaAttention", "bailing_hybrid", "BailingHybridConfig"),
    "bamba": _multi_head("BambaMixer", "bamba", "BambaConfig", "mamba_d_state"),
    "falcon_h1": _multi_head("FalconH1Mixer", "falcon_h1", "FalconH1Config", "mamba_d_state"),
    "falcon_mamba": StockFamily(
        "FalconMambaMixer",
        "falcon_mamba",
        "FalconMambaConfig",
        "state_size",
        "normed",
        norm="FalconMambaWeightlessRMSNorm",
        has_fused_training=True,
    ),
    "glm5_next": _kimi_delta(
        "Glm5NextTextLinearAttention",
        "glm5_next",
        "Glm5NextTextConfig",
        nested_size=_NESTED_SIZE,
        seeing_config="Glm5NextConfig",
    ),
    "granite_moe_hybrid": _multi_head(
        "GraniteMoeHybridMambaLayer", "granitemoehybrid", "GraniteMoeHybridConfig", "mamba_d_state"
    ),
    "jamba": StockFamily("JambaMambaMixer", "jamba", "JambaConfig", "mamba_d_state", "normed", norm="JambaRMSNorm"),
    "kimi_linear": _kimi_delta("KimiLinearDeltaAttention", "kimi_linear", "KimiLinearConfig", nested_size=_NESTED_SIZE),
    "mamba2": _multi_head("Mamba2Mixer", "mamba2", "Mamba2Config", "state_size"),
    "mamba": StockFamily("MambaMixer", "mamba", "MambaConfig", "state_size", "folded"),
    "minimax": StockFamily(
        "MiniMaxLightningAttention",
        "minimax",
        "MiniMaxConfig",
        "head_dim",
        "lightning",
        size_name="head_dim",
        groups_name="num_attention_heads",
    ),
    "nemotron_h": _multi_head("NemotronHMamba2Mixer", "nemotron_h", "NemotronHConfig", "ssm_state_size"),
    "olmo_hybrid": _gated_delta_net("OlmoHybridGatedDeltaNet", "olmo_hybrid", "OlmoHybridConfig"),
    "qwen3_5": _gated_delta_net("Qwen3_5GatedDeltaNet", "qwen3_5", "Qwen3_5TextConfig", "Qwen3_5Config"),
    "qwen3_5_moe": _gated_delta_net(
        "Qwen3_5MoeGatedDeltaNet", "qwen3_5_moe", "Qwen3_5MoeTextConfig", "Qwen3_5MoeConfig"
    ),
    "qwen3_next": _gated_delta_net("Qwen3NextGatedDeltaNet", "qwen3_next", "Qwen3NextConfig"),
    "qwen4_exp": _gated_delta_net("Qwen4ExpTextGatedDeltaNet", "qwen4_exp", "Qwen4ExpTextConfig", "Qwen4ExpConfig"),
    "zamba2": _multi_head("Zamba2MambaMixer", "zamba2", "Zamba2Config", "mamba_d_state"),
    "zamba": StockFamily("ZambaMambaMixer", "zamba", "ZambaConfig", "mamba_d_state", "folded"),
}


def family_of(name: str) -> StockFamily | None:
    """The row of a mixer, norm or configuration, by the name of its class; None where there is none."""
    return next((row for row in STOCK_FAMILIES.values() if name in (row.mixer, row.norm, *row.configs)), None)


def family_of_mixer(mixer: type) -> StockFamily | None:
    """The row of a mixer's class, or of the stock one that it derives from; None where there is none."""
    names = {base.__name__ for base in mixer.__mro__}
    return next((row for row in STOCK_FAMILIES.values() if row.mixer in names), None)
