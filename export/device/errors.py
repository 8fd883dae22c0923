"""The one kind of error a person on the device sees."""

from __future__ import annotations


class DeviceError(Exception):
    """One line: what was expected, what was found, how to fix it.

    `exit_code` is 1 where something could not be done and 3 where a check failed.
    """

    def __init__(self, message: str, *, exit_code: int = 1) -> None:
        super().__init__(message)
        self.exit_code = exit_code
