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
from .compressed_forms import all_changes, can_hold_forms, take_forms
from .contract import ScanObserver, StateSpaceLayer, SumOverProcesses
from .families.mixable import MixableLayer
from .families.narrowable import NarrowableLayer
from .families.time_invariant import TimeInvariantLayer
from .kernel_limits import refused_size, row_multiple, runs_on_kernels, size_multiple
from .measured_truncation import MeasuredTruncation, rows_of
from .moment_maps.axis import AxisMap, AxisSelection, Rescaling
from .moment_maps.modal import ModalMap
from .parameters import successor
from .projection_rows import KeptRows, ProjectionRows
from .registry import config_changes, find_layers, register, registered_families
from .scans.delta_rule import DeltaRuleInputs
from .scans.inputs import ChannelScans, ScanInputs, TimeAverages
from .scans.multi_head import MultiHeadScanInputs
from .scans.selective import SelectiveScanInputs
from .scans.stepped import SteppedScanInputs
from .scans.switch import (
    disable_fast_cpu_scan,
    enable_fast_cpu_scan,
    fast_cpu_scan,
    fast_cpu_scan_enabled,
    register_scan,
    watched,
)
from .scans.time_invariant import SystemInputs
from .state_layout import SizeAttribute, StateAxis, StateLayout, per_head, runs
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
    "ChannelScans",
    "DeltaRuleInputs",
    "KeptRows",
    "LayerReduction",
    "MixableLayer",
    "MeasuredTruncation",
    "ModalMap",
    "NarrowableLayer",
    "ProjectionRows",
    "rows_of",
    "MultiHeadScanInputs",
    "ParameterChange",
    "Rescaling",
    "ScanInputs",
    "ScanObserver",
    "SelectiveScanInputs",
    "SizeAttribute",
    "StateAxis",
    "StateForm",
    "StateLayout",
    "StateSpaceLayer",
    "SteppedScanInputs",
    "SumOverProcesses",
    "SystemInputs",
    "TimeAverages",
    "TimeInvariantLayer",
    "config_changes",
    "disable_fast_cpu_scan",
    "enable_fast_cpu_scan",
    "fast_cpu_scan",
    "fast_cpu_scan_enabled",
    "find_layers",
    "per_head",
    "refused_size",
    "row_multiple",
    "register",
    "register_scan",
    "registered_families",
    "runs",
    "runs_on_kernels",
    "size_multiple",
    "successor",
    "take_forms",
    "unsupported_note",
    "unsupported_recurrent_layers",
    "watched",
]
