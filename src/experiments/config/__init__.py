"""From a command line to a checked config: rules, schema, names, and one line for each mistake."""
