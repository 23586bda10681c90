"""Decide new state sizes, and find the truncations that give them."""
