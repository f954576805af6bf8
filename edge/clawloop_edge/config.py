"""The edge's configuration (`config.toml` in its home). Every key is described in docs/configuration.md."""

import msgspec

from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.gateway.settings import GatewaySettings


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model is served. `kind` is `mlx`, or `scripted` for drills; `path` is a model folder or a hub id."""

    path: str = ""
    kind: str = "mlx"
    script: str = ""


class PoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the pool's key is kept: `keychain`, or `file` (0600, in the home unless `key_file` names another)."""

    key: str = "keychain"
    key_file: str = ""


class PrivacyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long an item rests in the outbox before it may leave, and how often new records are put there."""

    hold_s: float = 86_400.0
    fill_every_s: float = 5.0


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often the edge asks the server for messages (with jitter)."""

    poll_s: float = 15.0


class AdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an adapter may be at most, and how far its probe may be off (nats)."""

    max_bytes: int = 1 << 30
    max_rank: int = 64
    probe_tolerance: float = 0.05
    keep: int = 3


class EdgeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    model: ModelConfig = ModelConfig()
    gateway: GatewaySettings = GatewaySettings()
    engine: EngineSettings = EngineSettings()
    pool: PoolConfig = PoolConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    node: NodeConfig = NodeConfig()
    adapters: AdapterConfig = AdapterConfig()
