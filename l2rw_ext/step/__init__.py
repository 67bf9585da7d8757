"""From scores to weights, and from weights to ``p.grad``."""
