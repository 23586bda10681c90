"""Model families behind one contract, and the switch that puts the fast scan into them."""

from . import families  # noqa: F401 - importing them registers them
from .changes import (
    ABSENT,
    AttributeChange,
    LayerReduction,
    ParameterAddition,
    ParameterChange,
    ParameterRemoval,
    StateForm,
)
from .compressed_forms import all_changes, can_hold_forms
from .contract import ScanObserver, StateSpaceLayer, SumOverProcesses
from .moment_maps.axis import AxisMap, AxisSelection, Rescaling
from .moment_maps.modal import ModalMap
from .parameters import successor
from .registry import config_changes, find_layers, register, registered_families
from .scans.delta_rule import DeltaRuleInputs
from .scans.inputs import ScanInputs, TimeAverages
from .scans.multi_head import MultiHeadScanInputs
from .scans.selective import SelectiveScanInputs
from .scans.switch import (
    disable_fast_cpu_scan,
    enable_fast_cpu_scan,
    fast_cpu_scan,
    fast_cpu_scan_enabled,
    register_scan,
)
from .scans.time_invariant import SystemInputs
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
    "DeltaRuleInputs",
    "LayerReduction",
    "ModalMap",
    "MultiHeadScanInputs",
    "ParameterChange",
    "Rescaling",
    "ScanInputs",
    "ScanObserver",
    "SelectiveScanInputs",
    "StateForm",
    "StateSpaceLayer",
    "SumOverProcesses",
    "SystemInputs",
    "TimeAverages",
    "config_changes",
    "disable_fast_cpu_scan",
    "enable_fast_cpu_scan",
    "fast_cpu_scan",
    "fast_cpu_scan_enabled",
    "find_layers",
    "register",
    "register_scan",
    "registered_families",
    "successor",
    "unsupported_note",
    "unsupported_recurrent_layers",
]
