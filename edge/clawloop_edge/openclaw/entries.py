"""What stands in OpenClaw's configuration so that it talks to this edge: a model provider, and the plugin.

Pure: from facts about the edge and the configuration as it is, to the changes. Observed on OpenClaw 2026.9.6.
"""

from __future__ import annotations

from collections.abc import Iterable
from enum import StrEnum
from pathlib import Path

import msgspec

from clawloop_edge.openclaw import json5
from clawloop_edge.openclaw.json5 import Json, Node
from clawloop_shared.errors import ConfigError

NAME = "clawloop"
"""of the provider, of its model, of the plugin and of the reference to the token"""
MODEL = f"{NAME}/{NAME}"
PLUGIN = Path(__file__).parent / "plugin"
CALL_TIMEOUT_S = 600
"""of one call, reading the prompt included"""
_DEFAULTS = ("agents", "defaults")
_PRIMARY = "primary"
_REFERENCE = {"source": "file", "provider": NAME, "id": "value"}
"""to the token, which stays in its file"""


class Api(StrEnum):
    """An API by which OpenClaw talks to its model provider."""

    COMPLETIONS = "completions"
    """OpenAI's chat completions, what OpenClaw uses if told nothing else"""
    RESPONSES = "responses"
    """OpenAI's responses"""
    MESSAGES = "messages"
    """Anthropic's messages; the token goes out as `x-api-key`"""

    @property
    def option(self) -> str:
        """Its name in OpenClaw's configuration."""
        return f"anthropic-{self}" if self is Api.MESSAGES else f"openai-{self}"

    def base_url(self, edge_url: str) -> str:
        """What OpenClaw puts its paths after; to that of Anthropic's API it adds `/v1` itself."""
        return edge_url if self is Api.MESSAGES else f"{edge_url}/v1"


class Edge(msgspec.Struct, frozen=True, kw_only=True):
    """The edge as OpenClaw needs to know it: its address without a path, the file with its token, how many tokens its
    model takes in all, and how many it writes at most."""

    url: str
    token_file: str
    context_tokens: int
    max_tokens: int


class Wish(msgspec.Struct, frozen=True, kw_only=True):
    """What the owner wants: by which API, the plugin or not, and the edge as the model of all agents, or of `agent`."""

    api: Api = Api.COMPLETIONS
    plugin: bool = True
    primary: bool = False
    agent: str = ""


class Change(msgspec.Struct, frozen=True, kw_only=True):
    """A value put under these keys, or an item added to the array there. `kept` objects were on the way already;
    `before` is what stood there, if anything did (`had`)."""

    path: list[str]
    value: Json
    item: bool = False
    kept: int = 0
    had: bool = False
    before: Json = None

    @property
    def own(self) -> bool:
        """Whether the place bears our name, so that whatever stands there is ours."""
        return not self.item and self.path[-1] == NAME


def provider(edge: Edge, api: Api) -> dict[str, Json]:
    """The edge as a model provider. The affinity headers name the conversation, so that the edge need not guess it;
    the token stays in its file."""
    model = {
        "id": NAME,
        "name": NAME,
        "reasoning": False,
        "input": ["text"],
        "cost": {"input": 0, "output": 0, "cacheRead": 0, "cacheWrite": 0},
        "contextWindow": edge.context_tokens,
        "maxTokens": edge.max_tokens,
        "compat": {
            "sendSessionAffinityHeaders": True,
            "supportsPromptCacheKey": True,
            "supportsUsageInStreaming": True,
            "maxTokensField": "max_tokens",
            "supportsStore": False,
            "supportsDeveloperRole": False,
        },
    }
    return {
        "baseUrl": api.base_url(edge.url),
        "apiKey": _REFERENCE,
        "api": api.option,
        "timeoutSeconds": CALL_TIMEOUT_S,
        "models": [model],
    }


def changes(config: Node, edge: Edge, wish: Wish) -> list[Change]:
    """What is to be changed in a configuration that has none of it yet.

    Raises:
        ConfigError: there is no agent of that name.
    """
    reference = {"source": "file", "path": edge.token_file, "mode": "singleValue"}
    found = [
        _put(config, ("secrets", "providers", NAME), reference),
        _put(config, ("models", "providers", NAME), provider(edge, wish.api)),
        *_listed(config, (*_DEFAULTS, "modelPolicy", "allow"), MODEL, covers=f"{NAME}/*"),
    ]
    if wish.primary or wish.agent:
        found.append(_put(config, _model_path(config, wish.agent), MODEL))
    if not wish.plugin:
        return found
    entry = {
        "enabled": True,
        "hooks": {"allowConversationAccess": True, "allowPromptInjection": False},
        "config": {"url": edge.url, "tokenFile": edge.token_file},
    }
    return [
        *found,
        *_item(config, ("plugins", "load", "paths"), str(PLUGIN)),
        _put(config, ("plugins", "entries", NAME), entry),
        *_listed(config, ("plugins", "allow"), NAME),
    ]


def applied(text: str, wanted: Iterable[Change]) -> str:
    """`text` with the changes.

    Raises:
        ConfigError: something on the way is no object, or no array.
    """
    for change in wanted:
        if change.item:
            text = json5.append(text, change.path, change.value)
        else:
            text = json5.put(text, change.path, change.value)
    return text


def undone(text: str, made: Iterable[Change]) -> str:
    """`text` without these changes: what bears our name goes, another value only where it is still the one we put."""
    for change in reversed(list(made)):
        found = json5.find(json5.read(text), change.path)
        if found is None:
            continue
        if change.item:
            text = json5.drop_item(text, change.path, change.value)
        elif change.own or found.value == change.value:
            text = json5.put(text, change.path, change.before) if change.had else json5.drop(text, change.path)
        text = _pruned(text, change)
    return text


def traces(config: Node, *, plugin: Path = PLUGIN) -> list[Change]:
    """Changes that would have led to what of ours stands in a configuration; for want of a record of them."""
    own = [("secrets", "providers", NAME), ("models", "providers", NAME), ("plugins", "entries", NAME)]
    named = [(*_DEFAULTS, "model", _PRIMARY), (*_DEFAULTS, "model")]
    items = [
        ((*_DEFAULTS, "modelPolicy", "allow"), MODEL),
        (("plugins", "load", "paths"), str(plugin)),
        (("plugins", "allow"), NAME),
    ]
    found = [Change(path=list(path), value=node.value) for path in own if (node := json5.find(config, path))]
    found += [
        Change(path=list(path), value=MODEL, kept=len(_DEFAULTS))
        for path in named
        if (node := json5.find(config, path)) and node.value == MODEL
    ]
    for path, item in items:
        node = json5.find(config, path)
        if node is not None and isinstance(node.value, list) and item in node.value:
            found.append(Change(path=list(path), value=item, item=True))
    return found


def is_ours(config: Node) -> bool:
    """Whether a provider of our name is one that `connect` put there, not one that somebody wrote by hand."""
    key = json5.find(config, ("models", "providers", NAME, "apiKey"))
    return key is not None and key.value == _REFERENCE


def is_primary(config: Node) -> bool:
    """Whether the edge is the model of all agents that name no other."""
    model = json5.find(config, (*_DEFAULTS, "model"))
    value = model.value if model else None
    return MODEL in (value, value.get(_PRIMARY) if isinstance(value, dict) else None)


def remarks(config: Node, wish: Wish) -> list[str]:
    """What in a configuration stands against the wish and is its owner's to decide."""
    found = []
    plugins = json5.find(config, ("plugins",))
    value = plugins.value if plugins and isinstance(plugins.value, dict) else {}
    if wish.plugin and (value.get("enabled") is False or NAME in (value.get("deny") or [])):
        found.append("its plugins are off (plugins.enabled or plugins.deny), so /good and /bad will not work")
    agents = json5.find(config, ("agents", "entries"))
    for name, agent in (agents.value if agents and isinstance(agents.value, dict) else {}).items():
        if wish.primary and isinstance(agent, dict) and "model" in agent and name != wish.agent:
            found.append(f"agent {name} names a model of its own; --agent {name} gives it this one")
    return found


def _put(config: Node, path: tuple[str, ...], value: Json) -> Change:
    node = json5.find(config, path)
    kept = _kept(config, path[:-1])
    return Change(path=list(path), value=value, kept=kept, had=node is not None, before=node.value if node else None)


def _item(config: Node, path: tuple[str, ...], item: str) -> list[Change]:
    """The item as one more of a list; nothing if it is there."""
    node = json5.find(config, path)
    if node is not None and isinstance(node.value, list) and item in node.value:
        return []
    return [Change(path=list(path), value=item, item=True, kept=_kept(config, path))]


def _listed(config: Node, path: tuple[str, ...], item: str, *, covers: str = "") -> list[Change]:
    """The item as one more of a list that restricts: of one that is there and has something in it, but not `covers`."""
    node = json5.find(config, path)
    if node is None or not isinstance(node.value, list) or not node.value or covers in node.value:
        return []
    return _item(config, path, item)


def _model_path(config: Node, agent: str) -> tuple[str, ...]:
    """Where the model is named: of all agents, or of one. It is a text, or an object with its fallbacks."""
    path: tuple[str, ...] = ("agents", "entries", agent, "model") if agent else (*_DEFAULTS, "model")
    if agent and json5.find(config, path[:-1]) is None:
        raise ConfigError(f"no agent {agent} in agents.entries; `openclaw agents list` names them")
    node = json5.find(config, path)
    return path if node is not None and isinstance(node.value, str) else (*path, _PRIMARY)


def _kept(config: Node, path: tuple[str, ...]) -> int:
    """How many of the objects on the way are there already."""
    return next((depth for depth in range(len(path)) if json5.find(config, path[: depth + 1]) is None), len(path))


def _pruned(text: str, change: Change) -> str:
    """`text` without what was made for a change and is empty now."""
    last = len(change.path) if change.item else len(change.path) - 1
    for depth in range(last, change.kept, -1):
        node = json5.find(json5.read(text), change.path[:depth])
        if node is None or node.value:
            break
        text = json5.drop(text, change.path[:depth])
    return text
