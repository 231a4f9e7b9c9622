"""How a run ends that does not end well."""

from __future__ import annotations


class TrainingFailed(RuntimeError):
    """The run cannot go on; the message says at which step, and what is left of it."""

    def __init__(self, message: str, step: int | None = None) -> None:
        super().__init__(message)
        self.step = step


class Interrupted(KeyboardInterrupt):
    """Ctrl-C or SIGTERM: everything is saved, the message says how to go on."""
