"""What the kept adapters say of themselves, for people to read. Nothing is verified here: serving verifies."""

import msgspec

from clawloop_edge.adapters.store import AdapterStore
from clawloop_shared.errors import AdapterInvalid
from clawloop_shared.manifest import Manifest


class KeptAdapter(msgspec.Struct, frozen=True, kw_only=True):
    """One kept adapter. Rewards are what the server's gate measured for it and for the one before."""

    version: int
    current: bool
    rank: int
    reward: float
    reward_before: float
    round_id: str
    created_ms: int
    expires_ms: int


def kept_adapters(store: AdapterStore) -> list[KeptAdapter]:
    """Every kept version, rising.

    Raises:
        AdapterInvalid: a manifest on the disk cannot be read.
    """
    current = store.pointer().version
    return [_overview(store, version, current=current) for version in store.versions()]


def _overview(store: AdapterStore, version: int, *, current: int) -> KeptAdapter:
    try:
        manifest = msgspec.json.decode(store.read(version).manifest.body, type=Manifest)
    except msgspec.DecodeError as error:
        raise AdapterInvalid(f"the manifest of adapter {version} is damaged: {error}") from error
    return KeptAdapter(
        version=version,
        current=version == current,
        rank=manifest.rank,
        reward=manifest.evaluation.reward,
        reward_before=manifest.evaluation.reward_before,
        round_id=manifest.round_id,
        created_ms=manifest.created_ms,
        expires_ms=manifest.expires_ms,
    )
