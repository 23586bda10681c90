"""Model families behind one contract, and the switch that puts the fast scan into them."""

from . import (
    bamba,
    falcon_h1,
    falcon_mamba,
    granite_moe_hybrid,
    jamba,
    lru,
    mamba,
    mamba2,
    nemotron_h,
    s4d,
    zamba,
    zamba2,
)
from .base import (
    ABSENT,
    AttributeChange,
    LayerReduction,
    ParameterAddition,
    ParameterChange,
    ParameterRemoval,
    ScanObserver,
    StateSpaceLayer,
    SumOverProcesses,
    successor,
)
from .compressed_forms import all_changes, can_hold_forms
from .modal_map import ModalMap
from .moment_maps import AxisMap, AxisSelection, Rescaling
from .registry import config_changes, find_layers, register, registered_families
from .scan_inputs import MultiHeadScanInputs, ScanInputs, SelectiveScanInputs
from .scan_switch import (
    disable_fast_cpu_scan,
    enable_fast_cpu_scan,
    fast_cpu_scan,
    fast_cpu_scan_enabled,
    register_scan,
)
from .unsupported import unsupported_note, unsupported_recurrent_layers

__all__ = [
    "ABSENT",
    "ParameterAddition",
    "ParameterRemoval",
    "all_changes",
    "can_hold_forms",
    "AttributeChange",
    "AxisMap",
    "AxisSelection",
    "LayerReduction",
    "ModalMap",
    "MultiHeadScanInputs",
    "ParameterChange",
    "Rescaling",
    "ScanInputs",
    "ScanObserver",
    "SelectiveScanInputs",
    "StateSpaceLayer",
    "SumOverProcesses",
    "bamba",
    "config_changes",
    "disable_fast_cpu_scan",
    "enable_fast_cpu_scan",
    "falcon_h1",
    "falcon_mamba",
    "fast_cpu_scan",
    "fast_cpu_scan_enabled",
    "find_layers",
    "granite_moe_hybrid",
    "jamba",
    "lru",
    "mamba",
    "mamba2",
    "nemotron_h",
    "register",
    "register_scan",
    "registered_families",
    "s4d",
    "successor",
    "unsupported_note",
    "unsupported_recurrent_layers",
    "zamba",
    "zamba2",
]
