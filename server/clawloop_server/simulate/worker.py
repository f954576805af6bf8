"""One process of simulated devices: `python -m clawloop_server.simulate.worker`.

    stdin   one line of JSON (`Orders`), then the lines `rest` (make no more items) and `stop`
    stdout  one line of JSON a second (`Tally`), and at last `Result`

It ends when its stdin does, so it outlives nobody.
"""

import asyncio
import os
import resource
import ssl
import sys
from collections import Counter

import msgspec

from clawloop_server.simulate.device import Account, Device, Habits, gathered
from clawloop_server.simulate.node import Node, load_flwr
from clawloop_shared.lora import ModelShape
from clawloop_shared.model_line import ModelLine

_TALLY_S = 1.0
_MAX_LINE = 64 << 20


class Orders(msgspec.Struct, frozen=True, kw_only=True):
    """What a process is to be. It makes one device of each of `codes`, evenly over `ramp_s`."""

    url: str
    ca_pem: str
    root_key: bytes
    codes: list[str]
    line: ModelLine
    habits: Habits
    ramp_s: float
    shape: ModelShape
    deltas: float = 0.0
    """the share of them that is at level `deltas`"""


class Tally(msgspec.Struct, frozen=True, kw_only=True, tag="tally"):
    """How things are now, summed over the devices. `versions`: how many are at which adapter."""

    active: int
    greeted: int
    """have answered the server's first question"""
    polls: int
    calls: int
    errors: int
    drained: int
    versions: dict[int, int]


class Result(msgspec.Struct, frozen=True, kw_only=True, tag="result"):
    """What came of it. `faults`: what devices raised that they should not have."""

    accounts: list[Account]
    faults: list[str]
    cpu_s: float


async def run(orders: Orders, commands: asyncio.StreamReader) -> Result:
    """Be these devices until told to stop."""
    flwr = load_flwr()
    tls = ssl.create_default_context(cadata=orders.ca_pem)
    habits = orders.habits
    devices = [
        Device(
            Node(orders.url, tls, flwr=flwr, heartbeat_s=habits.heartbeat_s, keep_s=habits.keep_s),
            code=code,
            root_key=orders.root_key,
            line=orders.line,
            habits=habits,
            learns=orders.shape if is_of_share(number, orders.deltas) else None,
        )
        for number, code in enumerate(orders.codes)
    ]
    between_s = orders.ramp_s / max(1, len(devices))
    living = asyncio.create_task(gathered([_after(between_s * n, device) for n, device in enumerate(devices)]))
    telling = asyncio.create_task(_tell(devices))
    await _obey(commands, devices)
    for device in devices:
        device.stop()
    faults = await living
    telling.cancel()
    await asyncio.gather(telling, return_exceptions=True)
    accounts = [device.account for device in devices]
    return Result(accounts=accounts, faults=[f"{type(e).__name__}: {e}"[:300] for e in faults], cpu_s=_cpu_s())


def is_of_share(number: int, share: float) -> bool:
    """Whether the device of that number, from 0, is one of a share of all, spread evenly."""
    return int((number + 1) * share + 1e-9) > int(number * share + 1e-9)


async def _after(wait_s: float, device: Device) -> None:
    await asyncio.sleep(wait_s)
    await device.live()


async def _obey(commands: asyncio.StreamReader, devices: list[Device]) -> None:
    while command := (await commands.readline()).strip():
        if command == b"stop":
            return
        for device in devices:
            device.rest()


async def _tell(devices: list[Device]) -> None:
    while True:
        await asyncio.sleep(_TALLY_S)
        accounts = [device.account for device in devices]
        _write(
            Tally(
                active=sum(account.active for account in accounts),
                greeted=sum(account.answered > 0 for account in accounts),
                polls=sum(account.polls for account in accounts),
                calls=sum(sum(account.calls.values()) for account in accounts),
                errors=sum(sum(account.errors.values()) for account in accounts),
                drained=sum(device.drained for device in devices),
                versions=dict(Counter(account.version for account in accounts)),
            )
        )


def _write(value: msgspec.Struct) -> None:
    sys.stdout.buffer.write(msgspec.json.encode(value) + b"\n")
    sys.stdout.buffer.flush()


def _cpu_s() -> float:
    used = os.times()
    return used.user + used.system


def raise_file_limit() -> None:
    """Allow as many open files as the system lets a process have: each device needs one."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


async def main() -> None:
    """Read the orders, run, print the result."""
    commands = asyncio.StreamReader(limit=_MAX_LINE)
    loop = asyncio.get_running_loop()
    await loop.connect_read_pipe(lambda: asyncio.StreamReaderProtocol(commands), sys.stdin)
    orders = msgspec.json.decode(await commands.readline(), type=Orders)
    _write(await run(orders, commands))


if __name__ == "__main__":
    raise_file_limit()
    asyncio.run(main())
