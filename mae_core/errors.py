"""What can go wrong in a run that its user can mend. A retry of the same spec on the same data fails the same way.

MaeError
├── SpecError       the spec does not fit its data or this machine
├── DataError       a folder, an image or a label cannot be used
├── EncoderError    an encoder or a training state cannot be loaded, or does not fit
└── DivergedError   the loss is not finite
"""


class MaeError(Exception):
    """An error in what the user gave; the message says what is wrong, where, and what to do."""


class SpecError(MaeError):
    """The spec does not fit its data or this machine."""


class DataError(MaeError):
    """A folder, an image or a label cannot be used."""


class EncoderError(MaeError):
    """An encoder or a training state cannot be loaded, or does not fit."""


class DivergedError(MaeError):
    """The loss is not finite."""
