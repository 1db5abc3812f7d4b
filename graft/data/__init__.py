"""Read and write corpora in parquet, split them, and augment their clips for training."""
