"""The layouts that XPU kernels read (`--layout xpu`)."""
