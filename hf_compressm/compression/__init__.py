"""Calibrate, decide, cut and record: the compression of a model, without a Trainer."""

from .compressor import Compressor
from .cut.changes import Change, ModelChange, commit_together, roll_back_together
from .cut.optimizer import OptimizerChange, drop_stale_states, require_trained_layers, unwrap_optimizer
from .cut.pending_cut import PendingCut
from .cut.snapshot import AVERAGES_NAME, LAYERS_NAME, SNAPSHOT_NAME, Snapshot
from .decide.plan import LayerPlan, plan_reduction
from .history import (
    HISTORY_NAME,
    CheckRecord,
    LayerRecord,
    history_of,
    keep_old_history,
    read_history,
    sizes_after,
    standing_cuts,
    write_history,
)
from .measure.calibration import Calibration, calibrate
from .measure.layer_gramians import ClosedFormGramians, EmpiricalGramians, LayerGramians
from .measure.model_pass import LossFunction, evaluate_loss, model_loss
from .spectrum import Spectrum

__all__ = [
    "AVERAGES_NAME",
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
    "PendingCut",
    "Snapshot",
    "Spectrum",
    "calibrate",
    "commit_together",
    "drop_stale_states",
    "evaluate_loss",
    "history_of",
    "keep_old_history",
    "model_loss",
    "plan_reduction",
    "read_history",
    "require_trained_layers",
    "roll_back_together",
    "sizes_after",
    "standing_cuts",
    "unwrap_optimizer",
    "write_history",
]
