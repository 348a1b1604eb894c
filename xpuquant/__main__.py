"""`xpuquant` and `python -m xpuquant`."""

import sys


def main() -> int:
    """Run the command line; returns the exit code (documented in docs/cli.md)."""
    from xpuquant.convert.cli import run

    return run(sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
