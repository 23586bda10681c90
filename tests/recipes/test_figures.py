"""The figures of docs/method.md are drawn from what they say."""

from __future__ import annotations

import torch
from PIL import Image


def test_both_figures_are_drawn(recipes_folder, tmp_path) -> None:
    import figures

    figures.main(["--output-dir", str(tmp_path), "--states", "6", "--steps", "200"])
    for name in ("hankel_singular_values.png", "error_against_size.png"):
        assert Image.open(tmp_path / name).size[0] > 500
        assert (recipes_folder.parent / "docs" / "figures" / name).is_file(), "committed"


def test_the_figures_show_what_the_theory_says() -> None:
    import figures

    system = figures.lru_system(6, seed=0)
    found = figures.errors_of_sizes(system)
    assert all(error <= bound * (1 + 1e-9) for error, bound in zip(found["balanced truncation"], found["bound"]))
    exact = system.hankel_singular_values()
    measured = figures.measured_singular_values(system, 4000, 0.0, seed=0)
    assert torch.allclose(measured, exact, rtol=0.25)
