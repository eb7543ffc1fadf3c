"""From the command line to a validated config: rules, schema, names and one-line error messages."""
