"""Calibrate, decide, cut and record: the compression of a model, without a Trainer."""

from .adapters import holds_adapter, load_cut_layers
from .api import analyze, compress
from .apply import Change, ModelChange, commit_together, roll_back_together
from .calibration import Calibration, LossFunction, calibrate, evaluate_loss, model_loss
from .compressor import Compressor
from .gramians import ClosedFormGramians, EmpiricalGramians, LayerGramians
from .optimizer import OptimizerChange, drop_stale_states, require_trained, unwrap_optimizer
from .plan import LayerPlan, plan_reduction
from .record import (
    HISTORY_NAME,
    CheckRecord,
    LayerRecord,
    history_of,
    keep_old_history,
    read_history,
    sizes_after,
    write_history,
)
from .report import Spectrum
from .run_report import RunReport
from .snapshot import LAYERS_NAME, SNAPSHOT_NAME, Snapshot

__all__ = [
    "HISTORY_NAME",
    "LAYERS_NAME",
    "SNAPSHOT_NAME",
    "Calibration",
    "Change",
    "CheckRecord",
    "ClosedFormGramians",
    "Compressor",
    "EmpiricalGramians",
    "LayerGramians",
    "LayerPlan",
    "LayerRecord",
    "LossFunction",
    "ModelChange",
    "OptimizerChange",
    "RunReport",
    "Snapshot",
    "Spectrum",
    "analyze",
    "calibrate",
    "commit_together",
    "compress",
    "drop_stale_states",
    "evaluate_loss",
    "history_of",
    "holds_adapter",
    "keep_old_history",
    "load_cut_layers",
    "model_loss",
    "plan_reduction",
    "read_history",
    "require_trained",
    "roll_back_together",
    "sizes_after",
    "unwrap_optimizer",
    "write_history",
]
