"""Run directories: claiming, locking, recording, checkpointing and reading them."""
