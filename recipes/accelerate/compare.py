"""
Run the language model in one process and in two, and write how far their losses are apart.

Where DeepSpeed is installed (extra `deepspeed`), two processes of ZeRO stage 3 are compared with them.
"""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

from tabulate import tabulate

HERE = Path(__file__).parent
# What `accelerate launch` makes of configs/zero3.yaml; by itself it starts one process only on a CPU.
ZERO3 = {
    "ACCELERATE_USE_DEEPSPEED": "true",
    "ACCELERATE_DEEPSPEED_ZERO_STAGE": "3",
    "ACCELERATE_DEEPSPEED_ZERO3_INIT": "false",
    "ACCELERATE_DEEPSPEED_ZERO3_SAVE_16BIT_MODEL": "true",
    "ACCELERATE_GRADIENT_CLIPPING": "1.0",
}


def main() -> None:
    """Both runs, and the table."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "DS_ACCELERATOR": "cpu"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    launchers = {"1 process": [sys.executable], "2 processes": torchrun}
    if find_spec("deepspeed"):
        launchers["2 processes, ZeRO-3"] = torchrun
    runs = []
    for title, launcher in launchers.items():
        more = ZERO3 if "ZeRO" in title else {}
        with TemporaryDirectory() as folder:
            losses = Path(folder) / "losses.json"
            script = [str(HERE / "language_model.py"), "--output-dir", folder, "--losses", str(losses)]
            subprocess.run([*launcher, *script], check=True, env={**environment, **more})
            runs.append(json.loads(losses.read_text()))
    steps = range(0, len(runs[0]["losses"]), max(1, len(runs[0]["losses"]) // 6))
    rows = [[f"loss of step {step + 1}", *(f"{run['losses'][step]:.6f}" for run in runs)] for step in steps]
    rows.append(["evaluation loss", *(f"{run['evaluation loss']:.6f}" for run in runs)])
    rows.append(["state size at the end", *(str(run["state size"]) for run in runs)])
    furthest = max(abs(loss - first) for run in runs[1:] for loss, first in zip(run["losses"], runs[0]["losses"]))
    table = tabulate(rows, headers=["", *launchers], tablefmt="github", disable_numparse=True)
    text = (
        f"# The language model in one process and in two (gloo, CPU)\n\n{table}\n\nLargest difference of a step's "
        f"loss from that of one process: {furthest:.1e}. The cut: {runs[1]['cut']}\n\n"
        "Made by `python recipes/accelerate/compare.py`; Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}, accelerate "
        f"{version('accelerate')}.\n"
    )
    (HERE / "results" / "processes.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
