"""Measure what a training step costs: bytes kept for backward, peak memory, time."""

from leantune.measure.peak import PeakMemory, peak_rss, resident_bytes
from leantune.measure.saved import saved_activation_bytes, saved_storages
from leantune.measure.timing import StepClock, device_synchronize

__all__ = [
    "PeakMemory",
    "StepClock",
    "device_synchronize",
    "peak_rss",
    "resident_bytes",
    "saved_activation_bytes",
    "saved_storages",
]
