"""Results files, grids that go on where they stopped, tables and pictures."""

from __future__ import annotations

import json
from dataclasses import asdict, replace

import matplotlib
import pytest
import yaml
from experiments import runs as runs_module
from experiments.grids import GRIDS, Grid
from experiments.methods import compression_config
from experiments.report import picture, rows, table, write_report
from experiments.runs import ResultsFile, RunResult, RunSettings, execute_all

RESULT = RunResult(
    key="a",
    recipe="sfashion",
    model="lru",
    method="compressm",
    seed=0,
    varied={"final_state_size": 4},
    accuracy=0.5,
    initial_state_size=16,
    final_state_size=4,
    parameters=100,
    steps=6,
    seconds=2.0,
    cpu_seconds=1.0,
    extra_seconds=0.1,
    machine="a machine",
)


@pytest.fixture
def counted(monkeypatch):
    """Runs that are noted instead of executed."""
    executed = []

    def execute(settings, data, output_dir):
        executed.append(settings.key)
        return replace(RESULT, key=settings.key, method=settings.method, seed=settings.seed, varied=settings.varied)

    monkeypatch.setattr(runs_module, "execute", execute)
    return executed


def settings_of(tiny, seeds=(0, 1)) -> list[RunSettings]:
    return [RunSettings(tiny(), "compressm", seed, 4, {"final_state_size": 4}) for seed in seeds]


def test_finished_runs_are_not_repeated(tiny, counted, tmp_path) -> None:
    results = ResultsFile(tmp_path / "results.jsonl")
    execute_all(settings_of(tiny), None, tmp_path, results)
    assert len(counted) == 2
    found = execute_all(settings_of(tiny, seeds=(1, 2, 0)), None, tmp_path, results)
    assert [result.seed for result in found] == [1, 2, 0]
    assert len(counted) == 3, "only the new seed was executed"
    assert len(list(results)) == 3


def test_a_line_that_was_cut_short_is_repeated(tiny, counted, tmp_path) -> None:
    results = ResultsFile(tmp_path / "results.jsonl")
    execute_all(settings_of(tiny), None, tmp_path, results)
    text = results.path.read_text()
    results.path.write_text(text[:-30])
    assert len(list(results)) == 1
    execute_all(settings_of(tiny), None, tmp_path, results)
    assert len(counted) == 3
    assert len(list(results)) == 2, "the new line does not continue the broken one"


def test_other_settings_are_another_run(tiny) -> None:
    base = RunSettings(tiny(), "compressm", 0, 4)
    assert RunSettings(tiny(), "compressm", 0, 4, {"named": "otherwise"}).key == base.key
    others = [
        RunSettings(tiny(), "scratch", 0, 4),
        RunSettings(tiny(), "compressm", 1, 4),
        RunSettings(tiny(), "compressm", 0, 5),
        RunSettings(tiny(**{"compression.window": [0.0, 0.9]}), "compressm", 0, 4),
    ]
    assert len({run.key for run in [base, *others]}) == 5
    other_cut = tiny(**{"compression.tolerance": 0.9})
    assert RunSettings(other_cut, "scratch", 0, 4).key == others[0].key, "a model that is never cut is the same"
    with pytest.raises(ValueError, match="the method is 'prune'"):
        RunSettings(tiny(), "prune", 0)


@pytest.mark.parametrize("path", sorted(GRIDS.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_grids_of_the_repository_can_run(path) -> None:
    grid = Grid.from_file(path)
    expanded = grid.expand()
    assert len({run.key for run in expanded}) == len(expanded)
    assert len(grid.seeds) >= (1 if grid.name == "cost" else 3), "only times are measured once"
    for run in expanded:
        if run.method == "compressm":
            compression_config(run.experiment, run.final_state_size)


def test_lists_in_a_grid_are_all_combinations(tmp_path) -> None:
    content = {
        "title": "x",
        "config": "sfashion.yaml",
        "scale": "tiny",
        "seeds": [0, 1],
        "settings": {"training.max_steps": 7},
        "runs": [
            {"method": "full"},
            {
                "method": "compressm",
                "final_state_size": [4, 8],
                "compression.window": [[0.0, 0.1], [0.0, 0.5], [0.2, 0.5]],
            },
        ],
    }
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    expanded = Grid.from_file(tmp_path / "g.yaml").expand({"data.data_dir": "there"})
    assert len(expanded) == 2 * (1 + 6)
    assert {run.experiment.training.max_steps for run in expanded} == {7}
    assert {run.experiment.data["data_dir"] for run in expanded} == {"there"}
    assert expanded[1].varied == {"final_state_size": 4, "compression.window": [0.0, 0.1]}
    assert [run.seed for run in expanded] == [0] * 7 + [1] * 7
    with pytest.raises(FileNotFoundError, match="recipes/grids has"):
        Grid.from_file("nowhere.yaml")


def test_a_grid_has_one_data_set(tmp_path) -> None:
    content = {"title": "x", "config": "sfashion.yaml", "scale": "tiny", "seeds": [0]}
    content["runs"] = [{"method": "full", "data.pool": [1, 2]}]
    (tmp_path / "g.yaml").write_text(yaml.safe_dump(content))
    with pytest.raises(ValueError, match="data"):
        Grid.from_file(tmp_path / "g.yaml").expand()


def many_results() -> list[RunResult]:
    found = []
    for seed, accuracy in enumerate((0.5, 0.6)):
        found.append(replace(RESULT, method="full", varied={}, seed=seed, accuracy=0.7, cpu_seconds=4.0))
        for window in ([0.0, 0.1], [0.0, 0.3]):
            varied = {"final_state_size": 4, "compression.window": window}
            found.append(replace(RESULT, varied=varied, seed=seed, accuracy=accuracy))
    return found


def test_the_table_has_means_and_deviations_over_seeds() -> None:
    text = table(many_results())
    lines = text.splitlines()
    assert len(lines) == 2 + 3
    assert "window" in lines[0]
    assert "0.7000 +- 0.0000" in lines[2]
    assert "0.5500 +- 0.0707" in lines[3]
    assert "0 to 0.1" in lines[3]
    assert "| 0.25 " in lines[3], "a quarter of the full size's time"
    assert [len(row.results) for row in rows(many_results())] == [2, 2, 2]


def test_a_table_of_runs_that_shared_a_machine_has_no_times(tmp_path) -> None:
    header = table(many_results(), timed=False).splitlines()[0]
    assert "accuracy" in header
    assert "time" not in header
    page = write_report(many_results(), tmp_path / "page.md", "A title", "python recipes/grid.py", timed=False)
    assert " time" not in page.read_text()


def test_the_page_names_its_command_and_shows_its_picture(tmp_path) -> None:
    page = write_report(many_results(), tmp_path / "sub" / "page.md", "A title", "python recipes/grid.py")
    text = page.read_text()
    assert text.startswith("# A title\n")
    assert "`python recipes/grid.py`" in text
    assert "a machine" in text
    assert "![A title](page.png)" in text
    assert (tmp_path / "sub" / "page.png").stat().st_size > 10_000


def test_a_picture_over_a_setting(tmp_path) -> None:
    panels = [{"x": "compression.window", "where": {"final_state_size": 4}, "title": "one cut"}]
    with matplotlib.rc_context({"svg.fonttype": "none"}):
        picture(many_results(), tmp_path / "p.svg", panels)
    text = (tmp_path / "p.svg").read_text()
    assert all(words in text for words in ("one cut", "last cut", "full size", "CompreSSM in training"))


def test_a_result_is_one_line_of_json(tmp_path) -> None:
    results = ResultsFile(tmp_path / "r.jsonl")
    results.append(RESULT)
    (line,) = results.path.read_text().splitlines()
    assert json.loads(line) == asdict(RESULT)
    assert list(results) == [RESULT]
