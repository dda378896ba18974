"""One train step for every objective, and what surrounds it: batches, the loop, checkpoints."""
