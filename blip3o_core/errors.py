"""Errors written for the person at the screen: what happened, with which file or value, what to do. And who checks numbers."""

from __future__ import annotations

from collections.abc import Sequence


class Blip3oError(Exception):
    """Base of every error that a user can cause and mend."""


class MissingFilesError(Blip3oError):
    """A file or folder that the task needs is not there, or is only partly there."""


class WrongCheckpointError(Blip3oError):
    """The files are there but are not a BLIP3-o checkpoint that this program can load."""


class WrongAdapterError(Blip3oError):
    """A LoRA or other adapter does not belong to the loaded model."""


class BadInputError(Blip3oError, ValueError):
    """A value, image or text that cannot be worked with."""


class SettingError(BadInputError):
    """A setting that lies outside of what is allowed.

    Attributes:
        setting: its name in Python; a command line or a node may know it under another.
        fault: what is wrong with it, to be read after the name.
    """

    def __init__(self, setting: str, fault: str) -> None:
        super().__init__(f"{setting} {fault}")
        self.setting, self.fault = setting, fault


class TrainingDataError(Blip3oError):
    """Something is wrong with the images or captions of a training set."""


def check_range(name: str, value: float, low: float, high: float) -> None:
    """Raise SettingError unless low <= value <= high."""
    if not low <= value <= high:
        raise SettingError(name, f"is {value}; it must lie between {low} and {high}.")


def check_interval(interval: tuple[float, float]) -> None:
    """Raise SettingError unless 0 <= low <= high <= 1."""
    low, high = interval
    if not 0 <= low <= high <= 1:
        raise SettingError("guidance_interval", f"is {low} to {high}; use 0 <= low <= high <= 1.")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raise SettingError unless value is one of the choices."""
    if value not in choices:
        raise SettingError(name, f'is "{value}"; choose one of {", ".join(choices)}.')
