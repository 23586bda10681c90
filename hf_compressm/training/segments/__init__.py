"""Train in segments: one process group after the other, where a wrapper cannot see new shapes."""
