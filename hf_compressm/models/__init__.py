"""Models that transformers does not have: LRU, S4D, and sequence classifiers on Mamba and Mamba-2."""
