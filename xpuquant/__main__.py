"""`xpuquant` and `python -m xpuquant`."""

import gc
import os
import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code (documented in docs/cli.md)."""
    # Work is spread over threads here. OpenBLAS would add its own for each product, which wait by spinning: the
    # float64 products of a verification then take four times the processor time on a busy machine.
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
    # Plans are many small objects that stay. By default the collector looks at them after every 700 new ones: half of
    # the time of a checkpoint of 10^5 tensors.
    gc.set_threshold(100_000, 50, 100)
    try:
        from xpuquant.conversion.cli.app import run

        return run(sys.argv[1:])
    except KeyboardInterrupt:
        # Ctrl-C before the command line was there to take it.
        sys.stderr.write("error: interrupted\n")
        return 130
    finally:
        # All is said; what comes now ends the process quietly.
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


if __name__ == "__main__":
    sys.exit(main())
