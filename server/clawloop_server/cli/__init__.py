"""The command line: a thin layer over the library.

A known error becomes one line on stderr and exit 1, wrong usage exits 2, an unknown error keeps its traceback.
Nothing heavy is imported before a command runs.
"""

import sys

_EXTRA = {"aiohttp", "flwr", "peft", "psutil", "safetensors", "tokenizers", "torch", "transformers"}


def main(arguments: list[str] | None = None) -> None:
    """Run `clawloop-server` with these arguments (default: those of the process), and exit."""
    from clawloop_server.cli.commands import app
    from clawloop_shared.errors import ClawloopError

    try:
        app(args=arguments, prog_name="clawloop-server")
    except ClawloopError as error:
        print(f"clawloop-server: {error}", file=sys.stderr)
        sys.exit(1)
    except ModuleNotFoundError as error:
        name = (error.name or "").partition(".")[0]
        if name not in _EXTRA:
            raise
        print(f"clawloop-server: {name} is not installed; run: pip install 'clawloop[server]'", file=sys.stderr)
        sys.exit(1)
