"""`trainer.compile=true`: the training step as one compiled function."""
