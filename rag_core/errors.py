"""The errors that a user can mend.

Every message is one paragraph that names the place (file, line, row or setting), what was found, what was
expected and what to do. The command line prints the message alone; anything that is not a `RagError` is a
fault of ours and keeps its traceback.
"""

from __future__ import annotations


class RagError(Exception):
    """Base of every error that the user, not the developer, can mend."""


class InputError(RagError):
    """A file or row that somebody gave us cannot be used as it is."""


class ConfigError(RagError):
    """A setting is unknown, out of range, or does not fit another setting."""


class ArtifactError(RagError):
    """A folder that a stage should read is missing, damaged, of another kind, or does not fit another artifact."""


class NotFiniteError(RagError):
    """A model gave numbers that are not finite: its weights are damaged, or training diverged. `part` says which."""

    part = "a part of the model"

    @classmethod
    def of(cls, part: str, found: str) -> NotFiniteError:
        """`found` says where, with a capital letter and a full stop."""
        error = cls(
            f"Not finite: {part}. {found} The model's weights are damaged, or training diverged: train again with lower "
            "learning rates, or take another model."
        )
        error.part = part
        return error


class ModelNotice(UserWarning):
    """Something about a model that its user should know; the command line prints it as one line."""
