"""Readers for what the compressed-tensors library writes."""
