"""What an agent sees of the machine: little of the owner's environment, and where its model is."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping

from clawloop_shared.errors import ConfigError

_KEPT = ("HOME", "LANG", "LC_ALL", "LC_CTYPE", "LOGNAME", "PATH", "SHELL", "TERM", "TMPDIR", "TZ", "USER")
_OURS = "CLAWLOOP_"
_NO_KEY = "clawloop"
"""an agent needs no key, but its SDK wants one"""


def base_environment(names: Iterable[str], environment: Mapping[str, str] | None = None) -> dict[str, str]:
    """What every agent is given of the owner's environment: the usual few, and what was named.

    Raises:
        ConfigError: a name is not set, or is one of ours, whose values may be secret.
    """
    found = os.environ if environment is None else environment
    for name in names:
        if name.upper().startswith(_OURS):
            raise ConfigError(f"--env {name}: variables that begin with {_OURS} are the edge's own and stay here")
        if name not in found:
            raise ConfigError(f"--env {name}: it is not set here; set it, or leave it out")
    return {name: found[name] for name in (*_KEPT, *names) if name in found}


def agent_environment(
    base: Mapping[str, str], *, base_url: str, task: bytes, task_file: str, run: str, seed: int | None
) -> dict[str, str]:
    """The environment of one run. `base_url` is that of its trajectory, and ends in `/v1`."""
    ours = {
        "OPENAI_BASE_URL": base_url,
        "OPENAI_API_BASE": base_url,
        "OPENAI_API_KEY": _NO_KEY,
        "ANTHROPIC_BASE_URL": base_url.removesuffix("/v1"),
        "ANTHROPIC_API_KEY": _NO_KEY,
        "NO_PROXY": "localhost,127.0.0.1,::1",
        "CLAWLOOP_TASK": task.decode(),
        "CLAWLOOP_TASK_FILE": task_file,
        "CLAWLOOP_RUN": run,
    }
    seeded = {} if seed is None else {"CLAWLOOP_SEED": str(seed)}
    return {**base, **ours, **seeded}
