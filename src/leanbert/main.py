"""The program's entry: signals are answered before the libraries are imported, which takes seconds."""

from __future__ import annotations

from leanbert import signals


def main() -> None:
    """Run the command line of `sys.argv`; see `leanbert.cli.main`."""
    signals.install()
    from leanbert import cli

    cli.main()
