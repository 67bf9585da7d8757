"""Errors that end a command with one sentence."""

from __future__ import annotations


class UsageError(Exception):
    """What the user asked for cannot be done; the text is one sentence that says why."""
