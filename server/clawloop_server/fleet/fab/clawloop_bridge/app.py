"""Flower looks these two up by name. The client has no handler: devices never run what a server sends."""

from flwr.app import Context
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp

from clawloop_server.fleet import bridge

server = ServerApp()
client = ClientApp()


@server.main()  # type: ignore[untyped-decorator]
def main(grid: Grid, context: Context) -> None:
    """Run until the hub hangs up."""
    bridge.run(grid, context.run_id)
