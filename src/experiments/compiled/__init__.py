"""The same step as one compiled function."""
