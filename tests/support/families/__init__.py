"""Tiny models of the families that people serve."""
