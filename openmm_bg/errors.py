"""Errors that a user's input can cause. Each message is one sentence: which input, and what to do."""


class BGError(Exception):
    """Base of every error openmm_bg raises on purpose; commands print it without a traceback."""


class InputError(BGError, ValueError):
    """An argument, file or System that cannot be used as given."""


class EnergyError(BGError, RuntimeError):
    """Energies that cannot be evaluated, or that disagree with the user's Context."""


class ArtifactError(BGError, ValueError):
    """A flow file that is truncated, foreign, or made for another molecule."""


class CheckpointError(BGError, RuntimeError):
    """A training directory that cannot be read, resumed or written."""
