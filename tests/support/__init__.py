"""What the tests share: checkpoints made by hand, layers, models, a Hub on loopback, faults.

Independent of the product's own packing, on purpose.
"""
