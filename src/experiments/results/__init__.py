"""Many runs as rows, tables and pictures; imports no torch."""
