"""One step over the batches of several processes."""
