"""All benchmarks, one after the other; each writes its table to `results/`."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

BENCHMARKS = (
    "cpu_scan.py",
    "floor.py",
    "multi_head_scan.py",
    "step_time.py",
    "reduction_cost.py",
    "mixed_cost.py",
    "cut_accuracy.py",
    "delta_rule_accuracy.py",
    "recall.py",
    "diagonal_scan.py",
    "channel_systems.py",
    "lti_reduction.py",
    "selective_speed.py",
    "selective_accuracy.py",
    "projection_rows.py",
    "tolerance.py",
    "mamba_128_to_12.py",
)

if __name__ == "__main__":
    for script in BENCHMARKS:
        print(f"--- {script}", flush=True)
        subprocess.run([sys.executable, str(Path(__file__).parent / script)], check=True)
