"""What users hand in, and what is remembered of it."""
