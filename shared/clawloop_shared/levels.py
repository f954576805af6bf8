"""What a device lets out. Default: nothing.

The order is the order of exposure, so `min` of two levels is the more private one.
"""

from enum import StrEnum


class Level(StrEnum):
    """A privacy level, chosen by the owner of the device."""

    OFF = "off"
    """nothing leaves"""
    METRICS = "metrics"
    """bucketed counters, no content"""
    PRIVATE_DELTAS = "private-deltas"
    """LoRA deltas, clipped and noised on the device"""
    DELTAS = "deltas"
    """LoRA deltas as they are; part of what was said can be recovered from them"""
    REDACTED = "redacted"
    """steps with secrets and personal data taken out, token for token"""
    FULL = "full"
    """steps as they are"""

    @property
    def rank(self) -> int:
        """0 (`off`) to 5 (`full`)."""
        return list(Level).index(self)

    @property
    def sends_items(self) -> bool:
        """Whether anything of the outbox may leave at this level: deltas, or steps as well."""
        return self.rank >= Level.PRIVATE_DELTAS.rank

    @property
    def learns_at_home(self) -> bool:
        """Whether what is kept at this level is learned from on the device: it may not leave itself, its deltas may."""
        return self in (Level.PRIVATE_DELTAS, Level.DELTAS)

    @property
    def sends_steps(self) -> bool:
        """Whether steps may leave at this level."""
        return self.rank >= Level.REDACTED.rank


def lower(one: Level, other: Level) -> Level:
    """The more private of two levels."""
    return min(one, other, key=lambda level: level.rank)
