"""The `mole` program: flags, printing, exit codes; the only place that knows Typer."""
