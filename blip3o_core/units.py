"""Bytes for people: one unit for memory, weights, downloads and disks, so that a network has one size everywhere.

GB is 2^30 bytes, what is printed on a graphics card. Imports nothing heavy.
"""

from __future__ import annotations

GIB = 2**30
# Said by every command that prints sizes.
UNIT_WORDS = "Sizes are in GB of 2^30 bytes, as printed on a graphics card. The hub counts in 10^9."


def format_bytes(count: float) -> str:
    """Bytes for people, in powers of 1024: 512 B, 3.4 KB, 240.0 MB, 15.44 GB."""
    if round(count) < 1024:
        return f"{round(count)} B"
    value = float(count)
    for unit, digits in (("KB", 1), ("MB", 1), ("GB", 2)):
        value /= 1024
        # Judged as it is printed, so that no 1024.0 MB stands for 1.00 GB.
        if round(value, digits) < 1024:
            return f"{value:.{digits}f} {unit}"
    return f"{value / 1024:.2f} TB"
