"""The server's settings: `config.toml` in its home. A missing file means the defaults; unknown keys are refused.

Each room has its own table, described where the room is. Reading a configuration imports no framework.
"""

from __future__ import annotations

import ipaddress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import msgspec
import tomli_w

from clawloop_server.aggregate.settings import FederateSettings, check_federate
from clawloop_server.release.gate import GateSettings
from clawloop_server.trainer.settings import ClassifierSettings, TrainSettings, check_classifier, check_settings
from clawloop_server.vault.settings import RewardSettings
from clawloop_shared import config as shared_config
from clawloop_shared.errors import ConfigError
from clawloop_shared.files import publish_secret


class HubSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Where the server listens, and what devices call it."""

    host: str = "127.0.0.1"
    """address of the TLS port for devices; 0.0.0.0 for every network"""
    port: int = 8443
    """0: any that is free"""
    names: tuple[str, ...] = ("localhost", "127.0.0.1")
    """host names and addresses in the TLS certificate; the first is written into invitations"""
    public_url: str = ""
    """how devices reach the server if not by https://NAME:PORT, such as through a forwarded port"""
    admin_port: int = 8441
    """admin API, always on loopback; 0: any that is free"""
    line: str = ""
    """the model line that is trained; needed if base/ holds several"""
    approve: bool = False
    """a device that joins waits until `devices approve`; else its invitation is the approval"""
    trusted_proxies: tuple[str, ...] = ()
    """addresses of proxies before the TLS port whose X-Forwarded-For is believed"""


class FleetSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How often devices are asked, and Flower's own part."""

    upload_every_s: float = 15.0
    """how often a device is asked for what may leave"""
    status_every_s: float = 300.0
    """how often it is asked how it is"""
    max_item_mib: int = 256
    """the largest item that is taken of a device (in parts, if a message does not hold it)"""
    exchanges_per_s: float = 5.0
    """of these two questions, how many a second are asked in all; with more than 16 devices each may have its turn more
    seldom"""
    items_per_hour: int = 20_000
    """what is taken of one device; the rest stays there and is taken later; 0: all that comes"""
    mib_per_hour: float = 512.0
    """the same in MiB"""
    stock_nodes: bool = False
    """let devices connect by a stock SuperNode: those fetch the bridge's app (and never run it)"""
    superlink_port: int = 0
    """loopback port of Flower's SuperLink; 0: any that is free"""
    wrong_joins_per_minute: int = 30
    """wrong invitations a minute from one address before joining pauses for it"""
    wrong_joins_per_minute_total: int = 3000
    """and from all addresses together, before it pauses for all"""


class ReleaseSettings(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What happens to a candidate that passed."""

    auto: bool = True
    """release it at once; else `adapters release` does"""
    expires_days: float = 14.0
    """for how long devices may use an adapter"""


class ServerConfig(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """All settings of a server, one table each."""

    hub: HubSettings = HubSettings()
    fleet: FleetSettings = FleetSettings()
    reward: RewardSettings = RewardSettings()
    train: TrainSettings = TrainSettings()
    federate: FederateSettings = FederateSettings()
    classifier: ClassifierSettings = ClassifierSettings()
    gate: GateSettings = GateSettings()
    release: ReleaseSettings = ReleaseSettings()

    def url(self, *, port: int = 0) -> str:
        """How devices reach the server; `port` is the one it listens on, if that is not the configured one."""
        if self.hub.public_url:
            return self.hub.public_url.rstrip("/")
        name = self.hub.names[0] if self.hub.names else "localhost"
        return f"https://{f'[{name}]' if ':' in name else name}:{port or self.hub.port}"

    @property
    def certificate_names(self) -> list[str]:
        """Every name and address under which devices may call the server."""
        named = urlsplit(self.url()).hostname or "localhost"
        return list(dict.fromkeys([named, *self.hub.names]))


def load_config(path: Path) -> ServerConfig:
    """The settings in `path`, checked.

    Raises:
        ConfigError: not TOML, an unknown key, a wrong type, or a value out of bounds; the message names it.
    """
    config = shared_config.load(path, ServerConfig)
    try:
        return check_config(config)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def save_config(path: Path, config: ServerConfig) -> None:
    """Write [hub] whole and of the rest what differs from the defaults, so that defaults may get better.

    Raises:
        StorageError: the file cannot be written.
    """
    fields = _changes(msgspec.to_builtins(config), msgspec.to_builtins(ServerConfig()))
    publish_secret(path, tomli_w.dumps({**fields, "hub": msgspec.to_builtins(config.hub)}).encode())


def _changes(fields: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    pairs = {name: value for name, value in fields.items() if value != defaults.get(name)}
    return {n: _changes(value, defaults[n]) if isinstance(value, dict) else value for n, value in pairs.items()}


def check_config(config: ServerConfig) -> ServerConfig:
    """Return `config` if a server can run with it.

    Raises:
        ConfigError: a value is out of bounds.
    """
    hub, fleet, gate, release = config.hub, config.fleet, config.gate, config.release
    ports = {"[hub] port": hub.port, "[hub] admin_port": hub.admin_port, "[fleet] superlink_port": fleet.superlink_port}
    rules = {f"{name} {port} is not in 0..65535": 0 <= port <= 65535 for name, port in ports.items()}
    fixed = [port for port in ports.values() if port]
    rules |= {
        f"{', '.join(ports)} must differ: {fixed}": len(set(fixed)) == len(fixed),
        f"[hub] host {hub.host!r} is not an IP address": _is_address(hub.host),
        f"[hub] public_url {hub.public_url!r} must be https://HOST[:PORT] without a path": _is_origin(hub.public_url),
        f"[fleet] upload_every_s {fleet.upload_every_s} is not in (0, 86400]": 0 < fleet.upload_every_s <= 86400,
        f"[fleet] status_every_s {fleet.status_every_s} is not in (0, 86400]": 0 < fleet.status_every_s <= 86400,
        f"[fleet] exchanges_per_s {fleet.exchanges_per_s} is not in [0.1, 10000]": 0.1 <= fleet.exchanges_per_s <= 1e4,
        f"[fleet] items_per_hour {fleet.items_per_hour} is below 0": fleet.items_per_hour >= 0,
        f"[fleet] mib_per_hour {fleet.mib_per_hour} is below 0": 0 <= fleet.mib_per_hour < float("inf"),
        f"[fleet] max_item_mib {fleet.max_item_mib} is not in 8..1024": 8 <= fleet.max_item_mib <= 1024,
        f"[fleet] wrong_joins_per_minute {fleet.wrong_joins_per_minute} is below 1": fleet.wrong_joins_per_minute >= 1,
        f"[fleet] wrong_joins_per_minute_total {fleet.wrong_joins_per_minute_total} is below wrong_joins_per_minute": (
            fleet.wrong_joins_per_minute_total >= fleet.wrong_joins_per_minute
        ),
        f"[hub] trusted_proxies {list(hub.trusted_proxies)} must be IP addresses": all(
            _is_address(proxy) for proxy in hub.trusted_proxies
        ),
        f"[gate] samples {gate.samples} is below 1": gate.samples >= 1,
        f"[gate] max_tokens {gate.max_tokens} is below 1": gate.max_tokens >= 1,
        f"[gate] temperature {gate.temperature} is below 0": gate.temperature >= 0,
        f"[gate] z {gate.z} is below 0": gate.z >= 0,
        f"[release] expires_days {release.expires_days} is not in (0, 365]": 0 < release.expires_days <= 365,
    }
    broken = [rule for rule, holds in rules.items() if not holds]
    if broken:
        raise ConfigError("; ".join(broken))
    check_settings(config.train)
    check_classifier(config.classifier)
    check_federate(config.federate)
    return config


def _is_address(text: str) -> bool:
    try:
        ipaddress.ip_address(text)
    except ValueError:
        return False
    return True


def _is_origin(text: str) -> bool:
    if not text:
        return True
    parts = urlsplit(text)
    return parts.scheme == "https" and bool(parts.hostname) and parts.path in ("", "/") and not parts.query
