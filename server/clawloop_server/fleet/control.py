"""Flower's Control API as the hub uses it: runs and node keys. It has no authentication, so it never leaves loopback.

All of flwr's private parts that the hub's own process uses are here.
"""

import asyncio
import io
import logging
import os
import ssl
import zipfile
from pathlib import Path
from typing import Any

import msgspec
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

from clawloop_server.errors import FleetError
from clawloop_shared.files import sha256

_log = logging.getLogger(__name__)

_TIMEOUT_S = 30.0
_RUN_LIMIT = 100
_FINISHED = "finished"


class Node(msgspec.Struct, frozen=True):
    """A node key that the SuperLink lets in."""

    node_id: int
    name: str
    key_pem: str


def quiet_flwr() -> None:
    """Keep flwr from calling home and from writing to our console; before its first import."""
    os.environ["FLWR_TELEMETRY_ENABLED"] = "0"
    os.environ["FLWR_DISABLE_UPDATE_CHECK"] = "1"
    import flwr.supercore.telemetry  # noqa: F401

    for name in ("flwr", "flwr-telemetry", "httpx"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.setLevel(logging.WARNING)


class Control:
    """Calls to one SuperLink. Each runs in a thread, since flwr's client blocks."""

    def __init__(self, address: str, context: ssl.SSLContext) -> None:
        quiet_flwr()
        from flwr.supercore.control import ControlHttpClient

        self._client = ControlHttpClient(f"https://{address}", verify=context, timeout=_TIMEOUT_S)

    async def close(self) -> None:
        """Free the connections."""
        await asyncio.to_thread(self._client.close)

    async def ready(self) -> bool:
        """Whether the SuperLink answers."""
        try:
            await self.nodes()
        except FleetError:
            return False
        return True

    async def nodes(self) -> list[Node]:
        """Every key that is registered."""
        from flwr.proto.control_pb2 import ListNodesRequest

        response = await self._call("ListNodes", ListNodesRequest())
        return [Node(n.node_id, n.name, n.public_key.decode()) for n in response.nodes_info if not n.unregistered_at]

    async def register(self, key_pem: str, name: str) -> int:
        """Let a node key in as the only one of that name; its node id. Registering a key again gives the same id."""
        key, known = canonical_key(key_pem), await self.nodes()
        for node in known:
            if node.name == name and node.key_pem != key:
                await self.unregister(node.node_id)
        for node in known:
            if node.key_pem == key:
                return node.node_id
        return await self.add_key(key, name)

    async def add_key(self, key_pem: str, name: str) -> int:
        """Let a key in that is not registered yet, given in its canonical spelling; its node id."""
        from flwr.proto.control_pb2 import RegisterNodeRequest

        response = await self._call("RegisterNode", RegisterNodeRequest(public_key=key_pem.encode(), name=name))
        node_id: int = response.node_id
        return node_id

    async def unregister(self, node_id: int) -> None:
        """Let it in no more."""
        from flwr.proto.control_pb2 import UnregisterNodeRequest

        await self._call("UnregisterNode", UnregisterNodeRequest(node_id=node_id))

    async def start_run(self, app: Path) -> int:
        """Submit the app in a folder; the run's id."""
        from flwr.proto.control_pb2 import StartRunRequest
        from flwr.proto.fab_pb2 import Fab

        content = pack_app(app)
        fab = Fab(hash_str=sha256(content), content=content)
        response = await self._call("StartRun", StartRunRequest(fab=fab))
        if not response.HasField("run_id"):
            raise FleetError("the SuperLink did not start the bridge; see logs/superlink.log")
        run_id: int = response.run_id
        return run_id

    async def has_ended(self, run_id: int) -> bool:
        """Whether a run is over (or unknown)."""
        from flwr.proto.control_pb2 import ListRunsRequest

        response = await self._call("ListRuns", ListRunsRequest(run_id=run_id))
        run = response.run_dict.get(run_id)
        return run is None or run.status.status == _FINISHED

    async def stop_runs(self) -> None:
        """End every run that has not ended."""
        from flwr.proto.control_pb2 import ListRunsRequest, StopRunRequest

        response = await self._call("ListRuns", ListRunsRequest(limit=_RUN_LIMIT))
        for run_id, run in response.run_dict.items():
            if run.status.status != _FINISHED:
                try:
                    await self._call("StopRun", StopRunRequest(run_id=run_id))
                except FleetError as error:
                    _log.info("run %d: %s", run_id, error)

    async def _call(self, name: str, request: Any) -> Any:
        import httpx

        try:
            return await asyncio.to_thread(getattr(self._client, name), request)
        except httpx.HTTPStatusError as error:
            text = error.response.text[:300]
            raise FleetError(f"the SuperLink refused {name} ({error.response.status_code}): {text}") from error
        except (httpx.HTTPError, ValueError, RuntimeError) as error:
            raise FleetError(f"the SuperLink does not answer {name}: {type(error).__name__} {error}") from error


def pack_app(folder: Path) -> bytes:
    """A Flower app (FAB): a zip of its files, and in `.info/CONTENT` their names, SHA-256 and sizes in bits.

    flwr's own builder is not used: it is part of its command line and brings all of that into this process.
    """
    files = sorted(path for path in folder.rglob("*") if path.suffix in (".py", ".toml"))
    packed, content = io.BytesIO(), []
    with zipfile.ZipFile(packed, "w") as fab:
        for path in files:
            name, data = path.relative_to(folder).as_posix(), path.read_bytes()
            fab.writestr(zipfile.ZipInfo(name), data)
            content.append(f"{name},{sha256(data)},{len(data) * 8}")
        fab.writestr(zipfile.ZipInfo(".info/CONTENT"), "\n".join(content))
    return packed.getvalue()


def canonical_key(pem: str) -> str:
    """A node's public key in the one spelling that the SuperLink compares.

    Raises:
        FleetError: it is no EC P-384 public key.
    """
    try:
        key = serialization.load_pem_public_key(pem.encode())
    except ValueError as error:
        raise FleetError(f"the node key is no public key in PEM: {error}") from error
    if not isinstance(key, ec.EllipticCurvePublicKey) or not isinstance(key.curve, ec.SECP384R1):
        raise FleetError("the node key is not on curve P-384")
    return key.public_bytes(serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo).decode()
