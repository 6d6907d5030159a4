"""Which release gets which viewers: the target, and the backends that make it so."""
