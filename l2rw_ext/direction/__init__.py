"""Options that change the direction along which scores are taken."""
