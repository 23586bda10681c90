"""Every recipe's file, at every scale."""

from __future__ import annotations

import pytest
from experiments.data import KINDS
from experiments.methods import compression_config
from experiments.settings import CONFIGS, load_settings

RECIPES = sorted(path.name for path in CONFIGS.glob("*.yaml"))


def test_all_recipes_of_the_paper_are_there(recipes_folder) -> None:
    names = {"smnist", "scifar", "sfashion", "listops", "imdb", "aan", "pathfinder"}
    assert {name.removesuffix(".yaml") for name in RECIPES} == names
    assert all((recipes_folder / f"{name}.py").exists() for name in names)


@pytest.mark.parametrize("scale", ["paper", "small", "tiny"])
@pytest.mark.parametrize("name", RECIPES)
def test_every_scale_is_complete(name: str, scale: str) -> None:
    settings = load_settings(name, scale)
    assert settings.recipe == name.removesuffix(".yaml")
    assert settings.data["kind"] in KINDS
    config = compression_config(settings)
    assert 0 < config.tolerance < 1
    if scale == "paper":
        # A check every 2,000 steps in the first tenth of the training.
        assert (config.interval, config.window) == (2000, (0.0, 0.1))
        assert (settings.model["r_min"], settings.model["r_max"]) == (0.9, 0.999)


@pytest.mark.parametrize(
    ("name", "blocks", "state_size", "width", "steps", "batch", "rate", "factor", "decay", "dropout"),
    [
        ("smnist", 1, 256, 8, 200_000, 50, 4e-4, 1.0, 0.0, 0.1),
        ("scifar", 6, 384, 512, 180_000, 50, 1e-3, 0.25, 0.05, 0.1),
        ("listops", 6, 256, 128, 80_000, 32, 1e-3, 0.5, 0.05, 0.0),
        ("imdb", 1, 192, 256, 50_000, 32, 1e-3, 0.1, 0.05, 0.2),
        ("aan", 6, 256, 128, 100_000, 64, 1e-3, 0.5, 0.05, 0.1),
        ("pathfinder", 6, 256, 192, 500_000, 64, 1e-3, 0.25, 0.05, 0.0),
    ],
)
def test_settings_of_chahine_et_al(name, blocks, state_size, width, steps, batch, rate, factor, decay, dropout) -> None:
    settings = load_settings(f"{name}.yaml")
    model, training = settings.model, settings.training
    assert (model["num_hidden_layers"], model["state_size"], model["hidden_size"]) == (blocks, state_size, width)
    assert (training.max_steps, training.batch_size, training.learning_rate) == (steps, batch, rate)
    assert (training.state_space_lr_factor, training.weight_decay, model["dropout"]) == (factor, decay, dropout)


def test_overrides_reach_single_values() -> None:
    settings = load_settings("smnist.yaml", "tiny", {"model.state_size": 24, "data.data_dir": "somewhere"})
    assert (settings.state_size, settings.model["hidden_size"], settings.data["pool"]) == (24, 8, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"scale": "huge"}, "no scale 'huge'; choose one of paper, small, tiny"),
        ({"overrides": {"training.steps": 3}}, "unknown training settings steps"),
        ({"overrides": {"optimizer.name": 3}}, "not SECTION.NAME"),
    ],
)
def test_unknown_names_are_refused(arguments, message) -> None:
    with pytest.raises(ValueError, match=message):
        load_settings("smnist.yaml", **arguments)


def test_an_unknown_file_lists_the_known_ones() -> None:
    with pytest.raises(FileNotFoundError, match="smnist.yaml"):
        load_settings("mnist.yaml")


def test_the_fingerprint_follows_settings_and_not_folders() -> None:
    base = load_settings("smnist.yaml", "tiny")
    assert load_settings("smnist.yaml", "tiny", {"data.data_dir": "here"}).fingerprint() == base.fingerprint()
    assert load_settings("smnist.yaml", "tiny", {"training.max_steps": 5}).fingerprint() != base.fingerprint()
    other = load_settings("smnist.yaml", "tiny", {"compression.tolerance": 0.5})
    assert other.fingerprint() != base.fingerprint()
    assert other.fingerprint("data", "model", "training") == base.fingerprint("data", "model", "training")


def test_checks_are_spread_over_the_window() -> None:
    from hf_compressm.training import check_steps

    def steps(checks: int) -> list[int]:
        overrides = {"compression.checks": checks, "compression.window": [0.0, 0.3], "training.max_steps": 1000}
        return check_steps(compression_config(load_settings("smnist.yaml", "small", overrides)), 1000)

    assert steps(1) == [300]
    assert steps(3) == [100, 200, 300]


def test_a_final_size_becomes_the_target() -> None:
    settings = load_settings("smnist.yaml", "small")
    config = compression_config(settings, 16)
    assert (config.strategy, config.target_state_size) == ("target", 16)
    with pytest.raises(ValueError, match="between 1 and 127"):
        compression_config(settings, 128)
