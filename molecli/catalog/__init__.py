"""What there is, by name: methods, metrics, suites, and what ships inside the package. Imports no torch."""
