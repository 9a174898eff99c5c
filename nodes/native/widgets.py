"""What people write into text widgets."""

from __future__ import annotations

from ...blip3o_core.errors import BadInputError


def parse_weights(text: str, count: int, thing: str) -> list[float]:
    """One number for each of `count` things from "1, 0.5", or 1 for each when nothing is written.

    Args:
        thing: what messages call them, e.g. "input".

    Raises:
        BadInputError: not numbers, or another count.
    """
    if not text.strip():
        return [1.0] * count
    try:
        weights = [float(part) for part in text.replace(";", ",").split(",") if part.strip()]
    except ValueError:
        raise BadInputError(
            f'The weights "{text}" are not numbers.\nWrite one number for each {thing}, with commas: 1, 0.5'
        ) from None
    if len(weights) != count:
        raise BadInputError(
            f"There are {len(weights)} weights for {count} {thing}s.\n"
            f"Write one number for each {thing}, or none at all."
        )
    return weights
