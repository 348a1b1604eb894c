"""`xpuquant` and `python -m xpuquant`."""

import signal
import sys


def main() -> int:
    """Run the command line; returns the exit code (documented in docs/cli.md)."""
    try:
        from xpuquant.convert.cli import run

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
