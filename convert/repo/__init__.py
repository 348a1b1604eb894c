"""The output folder: what survives a crash, what is put beside the weights, and how it is opened again."""
