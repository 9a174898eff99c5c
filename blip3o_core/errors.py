"""Errors written for the person at the screen: what happened, with which file or value, what to do."""


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


class TrainingDataError(Blip3oError):
    """Something is wrong with the images or captions of a training set."""
