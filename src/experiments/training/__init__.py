"""The parts of a run, built from its config, and the loop that fits them."""
