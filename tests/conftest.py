"""For every test: one BLAS thread. Workers run side by side, and threads below them only spin."""

import os

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")
