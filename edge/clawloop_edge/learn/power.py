"""Whether this device is on power, and how much room its disk has. Knows no schedule."""

from enum import StrEnum

import psutil


class Power(StrEnum):
    """Where the device's power comes from."""

    MAINS = "on power"
    """plugged in, or it has no battery"""
    BATTERY = "on battery"
    """it would drain the battery"""
    UNKNOWN = "not known whether on power"
    """the system does not tell"""


def power() -> Power:
    """Where the power comes from now. A machine without a battery is on power."""
    sensors = getattr(psutil, "sensors_battery", None)  # a platform that cannot tell has no such function
    if sensors is None:
        return Power.UNKNOWN
    try:
        battery = sensors()
    except (OSError, ValueError, RuntimeError):
        return Power.UNKNOWN
    if battery is None:
        return Power.MAINS
    if battery.power_plugged is None:
        return Power.UNKNOWN
    return Power.MAINS if battery.power_plugged else Power.BATTERY
