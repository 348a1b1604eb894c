"""How a conversion is carried out from start to end: here, with little disk, in parts, on a cluster."""
