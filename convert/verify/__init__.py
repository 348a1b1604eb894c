"""Whether a converted repo may be deployed: integrity, exactness, kernels, sanity. Output is only read."""
