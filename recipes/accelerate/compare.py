"""Run the language model in one process and in two, and write how far their losses are apart."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

from tabulate import tabulate

HERE = Path(__file__).parent


def main() -> None:
    """Both runs, and the table."""
    with TemporaryDirectory() as folder:
        script = [str(HERE / "language_model.py"), "--output-dir", folder]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
        for command in ([sys.executable, *script], [*launcher, *script]):
            subprocess.run(command, check=True, env=environment)
        runs = [json.loads((Path(folder) / f"losses_{count}.json").read_text()) for count in (1, 2)]
    steps = range(0, len(runs[0]["losses"]), max(1, len(runs[0]["losses"]) // 6))
    rows = [[f"loss of step {step + 1}", *(f"{run['losses'][step]:.6f}" for run in runs)] for step in steps]
    rows.append(["evaluation loss", *(f"{run['evaluation loss']:.6f}" for run in runs)])
    rows.append(["state size at the end", *(str(run["state size"]) for run in runs)])
    furthest = max(abs(one - two) for one, two in zip(*(run["losses"] for run in runs)))
    table = tabulate(rows, headers=["", "1 process", "2 processes"], tablefmt="github", disable_numparse=True)
    text = (
        f"# The language model in one process and in two (gloo, CPU)\n\n{table}\n\nLargest difference of a step's "
        f"loss: {furthest:.1e}. The cut: {runs[1]['cut']}\n\nMade by `python recipes/accelerate/compare.py`; Python "
        f"{platform.python_version()}, torch {version('torch')}, transformers {version('transformers')}, accelerate "
        f"{version('accelerate')}.\n"
    )
    (HERE / "results" / "processes.md").write_text(text, encoding="utf-8")
    print(text)


if __name__ == "__main__":
    main()
