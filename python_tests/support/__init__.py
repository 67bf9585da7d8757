"""What several test files share: models, the oracle, drawn arguments, tolerances, stand-ins."""
