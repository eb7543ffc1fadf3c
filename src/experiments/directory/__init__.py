"""A run directory: claimed, locked, recorded, checkpointed, and read back."""
