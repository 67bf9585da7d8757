"""The forward engine: scores as a derivative along the direction."""
