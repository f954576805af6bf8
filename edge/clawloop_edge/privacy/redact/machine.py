"""The detector of one edge: the pack, what its machine is known to hold, and its owner's words."""

from __future__ import annotations

from clawloop_edge.home import EdgeHome
from clawloop_edge.privacy.redact import known, words
from clawloop_edge.privacy.redact.detector import Detector
from clawloop_edge.privacy.redact.patterns import patterns


def detector(home: EdgeHome) -> Detector:
    """Made for the edge at `home`; reads files and the environment, so make it once, and off the event loop.

    Raises:
        ConfigError: the configuration or the file of words is wrong.
    """
    settings = home.load_config().privacy if home.exists else None
    own = words.own_words(settings.redact_words if settings else (), home.folder / words.FILE)
    machine = known.this_machine([home.token_file])
    return Detector(patterns(), known.known_values(machine, patterns()), words=own)
