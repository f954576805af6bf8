"""Adapters at a vLLM server: written where it can read them, and loaded and unloaded through its endpoints.

    <adapter_folder>/<name>/{adapter_config.json, adapter_model.safetensors}    written once, never changed

A name holds the version and a hash of the files: vLLM caches prefixes by an adapter's name, and the numbers of two
learning servers are not the same versions.
"""

import asyncio
import secrets
import shutil
from pathlib import Path

import msgspec

from clawloop_edge.engine.upstream_http import Upstream
from clawloop_edge.errors import EngineError, RequestError
from clawloop_shared.errors import AdapterInvalid, ConfigError, StorageError
from clawloop_shared.files import publish, sha256, sync_folder
from clawloop_shared.lora import FILES, MAX_RANK
from clawloop_shared.records import Policy

_DRAFT = ".draft-"


class AdapterLoader:
    """Loads adapters under one folder, which the server sees under the same path.

    One that the server had already is another process's too (an edge that serves, beside a rescoring): it stays there.
    """

    def __init__(self, upstream: Upstream, folder: Path) -> None:
        """Raises ConfigError: the folder is not named in full."""
        if not folder.is_absolute():
            raise ConfigError(
                f"[upstream] adapter_folder = {str(folder)!r}; name a folder in full, as the server sees it"
            )
        self._upstream, self._folder = upstream, folder
        self._names: dict[Policy, str] = {}
        self._found: set[Policy] = set()
        self._lock = asyncio.Lock()

    def name_of(self, policy: Policy) -> str:
        """The model name by which the server knows a loaded adapter."""
        return self._names[policy]

    async def load(self, policy: Policy, files: dict[str, bytes]) -> None:
        """Write an adapter and have the server load it; nothing happens if it has.

        Raises:
            AdapterInvalid: a value is not finite, or the server refuses it.
            StorageError: it cannot be written.
            EngineError: the server cannot be asked.
        """
        await asyncio.to_thread(_check_finite, files)
        digest = sha256("".join(sha256(files[name]) for name in FILES).encode())
        name = f"clawloop-{policy.version}-{digest[:12]}"
        async with self._lock:
            await asyncio.to_thread(_write, self._folder, name, files)
            if not await self._ask_to_load(name):
                self._found.add(policy)
            self._names[policy] = name

    async def reload(self, policy: Policy) -> None:
        """Have a server that forgot an adapter load it again. Raises like `load`."""
        async with self._lock:
            if policy in self._names:
                await self._ask_to_load(self._names[policy])

    async def unload(self, policy: Policy) -> None:
        """Have the server forget an adapter that it has from here, and remove its files. Raises EngineError."""
        async with self._lock:
            name = self._names.pop(policy, None)
            if name is None or policy in self._found:
                self._found.discard(policy)
                return
            try:
                await self._tell("unload_lora_adapter", {"lora_name": name})
            except RequestError as error:
                if error.status != 404:
                    raise EngineError(f"the upstream server does not unload {name}: {error}") from error
            await asyncio.to_thread(shutil.rmtree, self._folder / name, ignore_errors=True)

    async def _ask_to_load(self, name: str) -> bool:
        """Whether the server has loaded it now; False if it had it before."""
        try:
            await self._tell("load_lora_adapter", {"lora_name": name, "lora_path": str(self._folder / name)})
            return True
        except RequestError as error:
            if any(card.id == name for card in await self._upstream.models()):
                return False
            if error.status in (404, 405):
                raise EngineError(
                    "the upstream server loads no adapters; start vLLM with --enable-lora and "
                    "VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, and let it see [upstream] adapter_folder"
                ) from error
            raise AdapterInvalid(f"the upstream server refuses {name}: {error}") from error

    async def _tell(self, path: str, body: dict[str, str]) -> None:
        """Ask for what is answered in plain text."""
        async with await self._upstream.post(path, msgspec.json.encode(body)) as response:
            await self._upstream.whole(response)


def _check_finite(files: dict[str, bytes]) -> None:
    """vLLM takes NaN without a word. Raises AdapterInvalid."""
    from clawloop_edge.adapters.convert import read_factors

    read_factors(files, rank_max=MAX_RANK)


def _write(folder: Path, name: str, files: dict[str, bytes]) -> None:
    """Publish an adapter whole or not at all; one of this name has the same bytes."""
    target, draft = folder / name, folder / f"{_DRAFT}{name}-{secrets.token_hex(4)}"
    if target.is_dir():
        return
    try:
        draft.mkdir(mode=0o755, parents=True)  # the server may run as somebody else
        for file in FILES:
            publish(draft / file, files[file])
        draft.rename(target)
        sync_folder(folder)
    except OSError as error:
        shutil.rmtree(draft, ignore_errors=True)
        raise StorageError(f"cannot write {target}: {error.strerror}; check [upstream] adapter_folder") from error
