"""The card of a run: its evaluations, the time of its steps, and when it is written."""
