"""Experts on a frozen model: hooks, layouts, and the building of a mixture from a method's row."""
