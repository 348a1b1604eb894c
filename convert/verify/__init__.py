"""Whether a converted repo may be deployed: integrity, exactness, kernels, health. Output is only read."""
