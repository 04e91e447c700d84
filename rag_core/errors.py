"""The errors that a user can fix.

Every message is one paragraph that names the place (file, line, row or setting), what was found, what was expected
and what to do. The command line prints the message alone. Any other exception is a bug in this program and keeps its
traceback.
"""

from __future__ import annotations


class RagError(Exception):
    """Base class of errors that the user, not the developer, can fix."""


class InputError(RagError):
    """An input file or a row of it cannot be used."""


class ConfigError(RagError):
    """A setting is unknown, out of range, or does not fit another setting."""


class ArtifactError(RagError):
    """An artifact is missing, damaged, of the wrong kind, does not fit another artifact, or cannot be written."""


class NotFiniteError(RagError):
    """A model gave NaN or infinity: its weights are damaged, or training diverged. `part` names what was not finite."""

    part = "a part of the model"

    @classmethod
    def of(cls, part: str, found: str) -> NotFiniteError:
        """The error for `part`; `found` is a whole sentence that says where."""
        error = cls(
            f"Not finite: {part}. {found} The model's weights are damaged, or training diverged: train again with "
            "lower learning rates, or take another model."
        )
        error.part = part
        return error


class ModelNotice(UserWarning):
    """A warning about a model; the command line prints it as one line."""
