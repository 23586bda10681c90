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
from .axis_selection import AxisSelection
from .base import (
    AttributeChange,
    AxisMap,
    LayerReduction,
    ParameterChange,
    ScanObserver,
    StateSpaceLayer,
    SumOverProcesses,
    successor,
)
from .modal_map import ModalMap
from .registry import config_changes, find_layers, register, registered_families
from .scan_inputs import MultiHeadScanInputs, ScanInputs, SelectiveScanInputs
from .scan_switch import (
    disable_fast_cpu_scan,
    enable_fast_cpu_scan,
    fast_cpu_scan,
    fast_cpu_scan_enabled,
    register_scan,
)

__all__ = [
    "AttributeChange",
    "AxisMap",
    "AxisSelection",
    "LayerReduction",
    "ModalMap",
    "MultiHeadScanInputs",
    "ParameterChange",
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
    "zamba",
    "zamba2",
]
