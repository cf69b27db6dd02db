"""The errors that this package raises when the user has to change something.

Every message is one or two plain sentences: what is wrong, where, and what to do.
"""

from __future__ import annotations


class KDError(Exception):
    """Base class of all errors that this package raises on purpose."""


class SettingsError(KDError, ValueError):
    """A key is unknown, of the wrong type, or out of range."""


class TeacherError(KDError, ValueError):
    """A checkpoint cannot serve as the teacher of this student."""


class ScoringError(KDError, RuntimeError):
    """A model cannot be scored, or not with a gradient."""


class ProcessError(KDError, RuntimeError):
    """One of several processes died, and the others were stopped."""
