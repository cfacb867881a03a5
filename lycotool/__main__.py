"""The program, ``lycotool`` or ``python -m lycotool``: quiet when it is interrupted, from the first import on."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line."""
    try:
        from lycotool.cli import main as run

        run()
    except KeyboardInterrupt:  # before a command has begun, which says so itself
        sys.stderr.write("lycotool: error: interrupted\n")
        exec("")  # as in `lycotool.cli._errors`
        sys.exit(130)


if __name__ == "__main__":
    main()
