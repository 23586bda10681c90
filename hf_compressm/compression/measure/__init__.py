"""Measure the Gramians of every layer on calibration batches."""
