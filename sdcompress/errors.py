"""What can go wrong, and the exit code each kind ends with.

    SdcompressError        1   our side could not do it
    ├── InputError         1   a file or model is not what was expected
    ├── UsageError         2   the recipe or the command line asks for something impossible
    └── VerificationError  3   a complete artefact failed a check

Every message is one line that says what was expected, what was found and how to fix it.
"""


class SdcompressError(Exception):
    """Base of all errors shown to a person without a traceback."""

    exit_code = 1


class InputError(SdcompressError):
    """A file, directory or model cannot be used as it is."""


class UsageError(SdcompressError):
    """The request itself makes no sense, whatever the files hold."""

    exit_code = 2


class VerificationError(SdcompressError):
    """An artefact was read completely and a check on it failed."""

    exit_code = 3
