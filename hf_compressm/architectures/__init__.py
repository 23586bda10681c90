"""Model families behind one contract, and the switch that puts the fast scan into them."""

from . import mamba
from .base import (
    AttributeChange,
    AxisMap,
    LayerReduction,
    ParameterChange,
    ScanInputs,
    ScanObserver,
    StateSpaceLayer,
    SumOverProcesses,
    successor,
)
from .registry import config_changes, find_layers, register, registered_families
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
    "ParameterChange",
    "ScanInputs",
    "ScanObserver",
    "StateSpaceLayer",
    "SumOverProcesses",
    "config_changes",
    "disable_fast_cpu_scan",
    "enable_fast_cpu_scan",
    "fast_cpu_scan",
    "fast_cpu_scan_enabled",
    "find_layers",
    "mamba",
    "register",
    "register_scan",
    "registered_families",
    "successor",
]
