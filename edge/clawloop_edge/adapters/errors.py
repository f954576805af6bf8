"""Why an offered adapter is refused; all grow from clawloop_shared's AdapterInvalid.

AdapterInvalid
├── WrongLine        made for another base, quantisation, tokenizer or template
├── Expired          its manifest may no longer be used
├── OldVersion       not newer than what this device has already seen: a replay or a step back
└── ProbeFailed      base plus adapter do not compute what the manifest promises
"""

from clawloop_shared.errors import AdapterInvalid


class WrongLine(AdapterInvalid):
    """Made for another base, quantisation, tokenizer or template."""


class Expired(AdapterInvalid):
    """Its manifest may no longer be used."""


class OldVersion(AdapterInvalid):
    """Not newer than what this device has already seen."""


class ProbeFailed(AdapterInvalid):
    """Base plus adapter do not compute what the manifest promises."""
