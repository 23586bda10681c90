"""Checkpoint folders: whether they are whole, how old ones are replaced, and the mark of a running training."""
