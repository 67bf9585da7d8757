"""Steps that are captured once and replayed."""
