"""For every test: one BLAS thread (workers run side by side, and threads below them only spin), and no deadline for an
example of hypothesis (the first call of a compiled loop compiles it)."""

import os
from contextlib import suppress

for _variable in ("OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS"):
    os.environ.setdefault(_variable, "1")

with suppress(ImportError):  # the slow lanes' environments have no hypothesis
    from hypothesis import settings

    settings.register_profile("compiled", deadline=None)
    settings.load_profile("compiled")
