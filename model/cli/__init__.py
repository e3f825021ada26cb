"""Flags and what becomes of them."""
