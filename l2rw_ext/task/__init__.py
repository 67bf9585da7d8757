"""One step's work, and what it must leave as it was."""
