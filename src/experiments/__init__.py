"""Hydra-configured PyTorch experiments: a config is an experiment, a run is a directory."""
