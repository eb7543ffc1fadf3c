"""Sweeps: their jobs, the worker pool, the progress view and the hyperparameter search."""
