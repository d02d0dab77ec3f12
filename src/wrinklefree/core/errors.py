"""The exceptions for mistakes that a user can mend."""


class UserError(Exception):
    """A mistake that the user can mend. The message is one line: what is wrong, where, and what to do.

    The command line prints the message without a traceback and exits with code 2.
    """


class DataError(UserError):
    """The training data cannot be read on. The model is as good as before, and worth saving."""
