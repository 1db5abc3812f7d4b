"""Both training stages on Ray: Ray Data loads the planned batches, Ray Train runs the loop of graft.training."""
