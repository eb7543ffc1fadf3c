"""Hydra finds this folder as pkg://experiments.conf, in a wheel and in a clone."""
