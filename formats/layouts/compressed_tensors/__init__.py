"""The portable layouts (`--layout compressed-tensors`), which stock loaders read."""
