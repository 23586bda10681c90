"""Cut: change the model, its optimizer and copies of its weights all at once, or not at all."""
