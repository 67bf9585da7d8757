"""Three exact ways to the same scores, one interface."""
