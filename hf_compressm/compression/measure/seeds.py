"""Seeds of what a check draws at random."""

from __future__ import annotations


def seed_of_step(seed: int, step: int | None) -> int:
    """One seed for every (run, step), so that a resumed run draws what the uninterrupted one draws."""
    return (seed * 1_000_003 + (step or 0)) % 2**63
