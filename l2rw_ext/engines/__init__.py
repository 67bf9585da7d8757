"""Exact ways to the same scores, one interface."""
