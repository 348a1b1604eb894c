"""docs/commands.md: the help of every command, as the command line prints it.

    python scripts/commands.py          # writes the page again

tests/convert/test_commands_page.py compares it with the command line.
"""

from __future__ import annotations

import io
import os
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

PAGE = Path(__file__).resolve().parents[1] / "docs" / "commands.md"


def page() -> str:
    """The page as it has to be."""
    import typer

    from xpuquant.conversion.cli.app import COMMANDS, run

    os.environ["COLUMNS"] = "80"
    group: Any = typer.main.get_command(COMMANDS)
    commands = [name for name in group.commands if name != "help"]
    parts = [
        "# Every command\n\nAs `xpuquant COMMAND --help` prints it; made by `scripts/commands.py`. What the options "
        "mean for each other, and the exit codes: [cli.md](cli.md).\n"
    ]
    for name in commands:
        printed = io.StringIO()
        with redirect_stdout(printed):
            run([name, "--help"])
        parts.append(f"## {name}\n\n```text\n{printed.getvalue().strip()}\n```\n")
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page())
