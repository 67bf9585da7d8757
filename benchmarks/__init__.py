"""Benchmarks and the demo of l2rw_ext: ``python -m benchmarks --help``."""
