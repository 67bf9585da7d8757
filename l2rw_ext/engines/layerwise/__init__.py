"""The layer-wise engine: Eq. 12 from one first-order backward."""
