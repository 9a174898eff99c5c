"""What other libraries would print although nobody here can do anything about it, silenced by name.

Takes effect when it is imported, before or after those libraries are. Everything not named here is still printed.
"""

from __future__ import annotations

import logging
import re
import warnings

# (beginning of the message, category, beginning of the module's name); regular expressions, as in `warnings`.
WARNINGS: tuple[tuple[str, type[Warning], str], ...] = (
    # Pickles of other tools; read_pickle says itself when one cannot be read.
    ("Detected pickle protocol", UserWarning, r"torch\._weights_only_unpickler"),
)
# (logger, what its message holds)
LOG_LINES: tuple[tuple[str, str], ...] = (
    # The built-in model's config.json names the base of its rotary angles in both places that transformers has had;
    # versions before 5 take it from the other one.
    ("transformers.modeling_rope_utils", r"Unrecognized keys in `rope_scaling`.*\{'rope_theta'\}"),
)


class _LeaveOut:
    """A filter of a logger that drops one message."""

    def __init__(self, pattern: str) -> None:
        self._pattern = re.compile(pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return self._pattern.search(record.getMessage()) is None


def silence() -> None:
    """Add the filters to Python's own; called once, at import."""
    for message, category, module in WARNINGS:
        warnings.filterwarnings("ignore", message=message, category=category, module=module)
    for name, pattern in LOG_LINES:
        logging.getLogger(name).addFilter(_LeaveOut(pattern))


silence()
