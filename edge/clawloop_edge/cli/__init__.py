"""The command line: a thin layer over the library. `main` is the console script `clawloop-edge`."""

import sys


def main() -> None:
    """Run a command: a known failure is one line on stderr and exit 1, wrong usage exits 2, others keep their trace."""
    from clawloop_shared.errors import ClawloopError

    try:
        from clawloop_edge.cli.root import app

        app()
    except ClawloopError as error:
        from clawloop_edge.cli.context import shown

        sys.stderr.write(f"clawloop-edge: {shown(error)}\n")  # it may name what an agent or a server named
        sys.exit(1)
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0].startswith("clawloop"):
            raise
        sys.stderr.write(f"clawloop-edge: {error.name} is not installed; run: pip install 'clawloop[edge]'\n")
        sys.exit(1)
