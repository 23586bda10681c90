"""Model families behind one contract, and the switch that puts the fast scan into them."""

from . import lru, mamba, s4d
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
    "LayerReduction",
    "ModalMap",
    "MultiHeadScanInputs",
    "ParameterChange",
    "ScanInputs",
    "ScanObserver",
    "SelectiveScanInputs",
    "StateSpaceLayer",
    "SumOverProcesses",
    "config_changes",
    "disable_fast_cpu_scan",
    "enable_fast_cpu_scan",
    "fast_cpu_scan",
    "fast_cpu_scan_enabled",
    "find_layers",
    "lru",
    "mamba",
    "register",
    "register_scan",
    "registered_families",
    "s4d",
    "successor",
]
