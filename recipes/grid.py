"""
All runs of a grid, the ones that are finished already left out; writes the table and the picture.

    python recipes/grid.py --config recipes/grids/methods.yaml [--data-dir /usr/share/datasets/fashion-mnist]

Each finished run is a line of `RESULTS/NAME.jsonl`. The same command goes on where an interrupted one stopped.
"""

from __future__ import annotations

import argparse
import logging
import sys
from contextlib import nullcontext
from pathlib import Path

from experiments.data import load_data
from experiments.grids import Grid
from experiments.long_convolution import lru_by_convolution
from experiments.report import table, write_report
from experiments.runs import ResultsFile, execute_all

RESULTS = Path(__file__).parent / "results"


def main(arguments: list[str] | None = None) -> None:
    """Run a grid."""
    parser = argparse.ArgumentParser(description=__doc__.strip().splitlines()[0])
    parser.add_argument("--config", required=True, help="YAML file of the grid")
    parser.add_argument("--data-dir", help="folder with local files, instead of the Hub")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder for the results, the table, the picture")
    parser.add_argument("--output-dir", type=Path, default=Path("recipe_output"), help="for models and histories")
    parser.add_argument("--seeds", nargs="+", type=int, help="instead of the file's")
    parser.add_argument("--report-only", action="store_true", help="table and picture of what is finished; no run")
    options = parser.parse_args(arguments)
    logging.getLogger("transformers").setLevel(logging.ERROR)

    grid = Grid.from_file(options.config)
    runs = grid.expand({"data.data_dir": options.data_dir} if options.data_dir else None)
    if options.seeds:
        runs = [run for run in runs if run.seed in options.seeds]
    results = ResultsFile(options.results / f"{grid.name}.jsonl")
    if options.report_only:
        finished = {result.key for result in results}
        runs = [run for run in runs if run.key in finished]
        if not runs:
            raise SystemExit(f"{results.path} has no run of this grid.")
    data = None if options.report_only else load_data(runs[0].experiment.data)
    with lru_by_convolution() if grid.by_convolution else nullcontext():
        found = execute_all(runs, data, options.output_dir / grid.name, results)
    command = " ".join(["python", "recipes/grid.py", "--config", options.config])
    page = write_report(found, options.results / f"{grid.name}.md", grid.title, command, grid.panels, grid.timed)
    print(f"\n{table(found, grid.timed)}\n\n{page}")


if __name__ == "__main__":
    main(sys.argv[1:])
