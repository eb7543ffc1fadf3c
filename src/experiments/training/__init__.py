"""The parts of a run, built from its config, and the training loop."""
