"""The console script `minilora`, outside the package so that Ctrl-C while the package is imported is one line, too."""

import sys


def main() -> int:
    """Run the command line and return its exit status."""
    try:
        from minilora.cli import main as run

        return run()
    except KeyboardInterrupt:
        print("\nminilora: interrupted", file=sys.stderr)
        return 130
