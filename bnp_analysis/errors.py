"""The exceptions of the package.

Every message says what was wrong, what would have been computed instead, and the ways out.
Each class also derives from the built-in exception that a caller would expect.
"""

from __future__ import annotations


class BNPAnalysisError(Exception):
    """Base class of every exception that this package raises on purpose."""


class InvalidInputError(BNPAnalysisError, ValueError):
    """An argument has the wrong shape, type, dtype or value."""


class NoDerivativeError(InvalidInputError):
    """An operation of the model or the loss has no derivative of the order that a computation needs."""


class NonFiniteError(BNPAnalysisError, ValueError):
    """NaN or infinity in data, parameters, a loss, or a product."""


class StochasticModelError(BNPAnalysisError, ValueError):
    """The model does not define one function of its parameters over the given data.

    Random layers in training mode, or layers that couple the examples of a batch while there
    are several batches.
    """


class DerivativeError(InvalidInputError):
    """What autograd computes is not the derivative of the risk."""


class InconsistentDataError(BNPAnalysisError, ValueError):
    """Two passes over the data saw different examples."""


class NotConvexError(BNPAnalysisError, ValueError):
    """A matrix that must be positive semidefinite has a negative eigenvalue."""


class ZeroOperatorError(InvalidInputError):
    """A condition number was asked of an operator that is zero to rounding."""


class NullSpaceError(BNPAnalysisError, ValueError):
    """Declared null directions are not null, or are not linearly independent."""


class MemoryLimitError(BNPAnalysisError, MemoryError):
    """A computation is refused before it starts because its memory estimate exceeds the limit."""


class WorkLimitError(BNPAnalysisError, RuntimeError):
    """A computation is refused before it starts because it would take far too long."""


class DistributedError(BNPAnalysisError, RuntimeError):
    """Another process of a group failed, was lost, or is not at the same place with the same numbers."""


class DataNotFoundError(BNPAnalysisError, FileNotFoundError):
    """The files of a data set, or of a result, are not where they were looked for."""


class ChecksumError(BNPAnalysisError, ValueError):
    """A file of a data set is not the published one."""


class OutputError(BNPAnalysisError, OSError):
    """A file could not be written: the disk is full, its folder is gone or may not be written to."""


class TrainingWarning(UserWarning):
    """A training loop does not do what it was set up for: gradients are not preconditioned, layers are left alone."""


class MeasurementWarning(UserWarning):
    """What is measured may not be one function: a pass uses what cannot be followed to what is decided by it."""
