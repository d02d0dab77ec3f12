"""The one exception that means "the user can mend this"."""


class UserError(Exception):
    """A user's mistake: one line saying what is wrong, where, and what to do. The CLI prints it and exits with 2."""
