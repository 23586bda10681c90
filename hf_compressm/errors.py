"""The errors that hf_compressm raises.

Every class derives from [`CompreSSMError`] and from the built-in exception that a caller would expect in its place, so
both `except CompreSSMError` and `except ValueError` work. Each message names what was wrong, the value that was found,
the values that are allowed, and what to do. All of them are raised before anything of the model or the optimizer has
been changed.
"""


class CompreSSMError(Exception):
    """Base class of all errors raised by hf_compressm."""


class ConfigurationError(CompreSSMError, ValueError):
    """A setting has a value that is not allowed, or two settings contradict each other."""


class DimensionError(CompreSSMError, ValueError):
    """A tensor has a shape, or a rank a value, that does not fit the other arguments."""


class NotFiniteError(CompreSSMError, ValueError):
    """A tensor holds NaN or infinity where finite numbers are needed."""


class UnstableSystemError(CompreSSMError, ValueError):
    """A linear system has a pole outside the stability region, so that its Gramians do not exist."""


class TruncationError(CompreSSMError, ValueError):
    """A truncation failed one of its checks (finite, stable, biorthogonal, well conditioned); it must not be used."""


class UnsupportedModelError(CompreSSMError, TypeError):
    """A model has no layer that can be reduced, or a form (sharded, quantised) that cannot be reduced."""


class CalibrationError(CompreSSMError, RuntimeError):
    """The data pass that estimates Gramians could not be completed."""


class OtherProcessError(CalibrationError):
    """Another process of the training could not complete a check; nothing was changed in any of them."""


class DisagreementError(CompreSSMError, RuntimeError):
    """The processes of a training do not agree on what is to be done; nothing was changed in any of them."""


class CardError(CompreSSMError, ValueError):
    """A model card that is there cannot be read, so that nothing can be added to it."""


class InconsistentModelError(CompreSSMError, ValueError):
    """A folder's configuration, weights and history do not describe one model; it must not be loaded or pushed."""


class HubError(CompreSSMError, OSError):
    """The Hub refused an upload or could not be reached; the message says why and what to do. Local files are whole."""
