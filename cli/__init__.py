"""The command line: parses, calls one engine function, prints where the result is."""
