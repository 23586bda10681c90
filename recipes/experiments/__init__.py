"""What the recipes share: data, methods, metrics, one runner, and grids of runs with their tables and pictures."""
