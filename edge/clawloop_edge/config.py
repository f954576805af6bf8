"""The edge's configuration (`config.toml` in its home). Every key is described in docs/configuration.md."""

from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from clawloop_edge.engine.settings import EngineSettings
from clawloop_edge.engine.upstream_settings import UpstreamSettings
from clawloop_edge.gateway.settings import GatewaySettings
from clawloop_edge.learn.settings import LearnSettings
from clawloop_edge.pool.settings import RetentionSettings
from clawloop_edge.signals.settings import SignalsSettings
from clawloop_shared.signals import RewardRules

_Period = Annotated[float, Meta(ge=0.05, le=86_400)]
"""seconds between two tries of a thing that never ends"""
_Hold = Annotated[float, Meta(ge=0, le=3_650 * 86_400)]
"""seconds that an item rests before it leaves by itself"""


class ModelConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which model is served. `kind` is `mlx`, `upstream` for a model that another server has, or `scripted` for drills.

    `path` is a model folder or a hub id; before an upstream server it may be empty, and nothing is learned then.
    """

    path: str = ""
    kind: str = "mlx"
    script: str = ""


class PoolConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the pool's key is kept: `keychain`, `file`, or `passphrase`: a file that a passphrase seals.

    The file is 0600, in the home unless `key_file` names another.
    """

    key: str = "keychain"
    key_file: str = ""


class PrivacyConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How long an item rests in the outbox before it may leave (at `redacted` another time, if `hold_redacted_s` is
    set), how often new records are put there, and for how long one can be looked at after the server has it.

    At `redacted`: words of the owner's that are taken out, whether the local model is asked what else to take out, and
    whether neighbours of a secret go with it so that its length shows less. `epsilon` is what the noised deltas of a
    model line may cost.
    """

    hold_s: _Hold = 86_400.0
    hold_redacted_s: _Hold | None = None
    fill_every_s: _Period = 5.0
    keep_received_days: Annotated[float, Meta(ge=0, le=3_650)] = 7.0
    redact_words: list[str] = []
    second_opinion: bool = False
    strict_lengths: bool = True
    epsilon: Annotated[float, Meta(gt=0, le=100)] = 8.0


class NodeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """How often the edge asks the server for messages (with jitter), and through what: `embedded`, flwr's client inside
    the edge, or `stock`, a `flower-supernode` that the edge starts."""

    poll_s: _Period = 15.0
    driver: Literal["embedded", "stock"] = "embedded"


class AdapterConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What an adapter may be at most, and how far its probe may be off (nats)."""

    max_bytes: int = 1 << 30
    max_rank: int = 64
    probe_tolerance: Annotated[float, Meta(gt=0, le=10)] = 0.05
    keep: Annotated[int, Meta(ge=1, le=100)] = 3


class EdgeConfig(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """The whole file."""

    model: ModelConfig = ModelConfig()
    gateway: GatewaySettings = GatewaySettings()
    engine: EngineSettings = EngineSettings()
    pool: PoolConfig = PoolConfig()
    privacy: PrivacyConfig = PrivacyConfig()
    node: NodeConfig = NodeConfig()
    adapters: AdapterConfig = AdapterConfig()
    upstream: UpstreamSettings = UpstreamSettings()
    retention: RetentionSettings = RetentionSettings()
    signals: SignalsSettings = SignalsSettings()
    reward: RewardRules = RewardRules()
    learn: LearnSettings = LearnSettings()
