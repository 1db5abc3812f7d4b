"""Training without Ray: the epoch's plan, the loop, its backends, checkpoints and cost estimates."""
