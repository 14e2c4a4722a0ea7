"""Scores: how they are made, compared, stored and shown, whatever the base."""
