"""Many runs: what is to run, who runs it, and what one sees of it."""
