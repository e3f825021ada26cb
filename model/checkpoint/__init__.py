"""Checkpoints and the runs that they belong to."""
