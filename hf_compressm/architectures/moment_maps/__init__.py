"""How gradients, and with them optimizer moments, move under a cut."""
