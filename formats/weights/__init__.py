"""A source matrix in normal form: between what a reader understands and what a layout stores."""
