"""Comparing runs: rows, tables and plots. Imports no torch."""
