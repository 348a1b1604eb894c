"""Quantized checkpoints: what the files hold (readers) and what XPU kernels want (layouts)."""
