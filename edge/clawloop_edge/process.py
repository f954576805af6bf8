"""What the serving process may have of the system: no core dump, connections enough, and its port."""

import asyncio
import logging
import resource
import signal

from aiohttp import web

from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_shared.errors import ConfigError

_log = logging.getLogger(__name__)


def dump_no_core() -> None:
    """A crash must not write what this process has in memory to the disk."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


def allow_connections(calls: int) -> None:
    """Let the process have as many connections at once as calls may wait; macOS gives it 256 files by itself."""
    wanted = 2 * calls + 256
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    most = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft == resource.RLIM_INFINITY or soft >= most:
        return
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, hard))
    except (OSError, ValueError) as error:
        _log.warning("only %d connections at once: the system does not allow %d: %s", soft, most, error)


async def check_port(settings: GatewaySettings) -> None:
    """Tell before the model is loaded what `_listen` would tell after it. Raises ConfigError."""
    loop = asyncio.get_running_loop()
    try:
        server = await loop.create_server(asyncio.Protocol, settings.host, settings.port, start_serving=False)
    except OSError as error:
        raise _no_port(settings, error) from error
    server.close()
    await server.wait_closed()


async def listen(runner: web.AppRunner, settings: GatewaySettings) -> None:
    """Raises ConfigError: the address is taken, or is not one of this machine."""
    try:
        await web.TCPSite(runner, settings.host, settings.port).start()
    except OSError as error:
        raise _no_port(settings, error) from error


def _no_port(settings: GatewaySettings, error: OSError) -> ConfigError:
    return ConfigError(
        f"cannot listen on {settings.host}:{settings.port}: {error.strerror}; stop the program that has this port, "
        "or set another [gateway] port"
    )


class Stop:
    """SIGTERM and SIGINT: the first asks to finish the calls in flight, the next to cut them."""

    def __init__(self) -> None:
        self.asked, self.at_once = asyncio.Event(), asyncio.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._signal)

    def _signal(self) -> None:
        (self.at_once if self.asked.is_set() else self.asked).set()
