"""Labelled speech for training: corpora in parquet, their splits, and the augmentation of their clips."""
