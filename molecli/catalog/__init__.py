"""Methods, metrics, suites and built-in models by name. Imports no torch."""
