"""The one exception that says: what you gave me is wrong."""


class InputError(ValueError):
    """Something the user gave cannot be used; the message says what, where, and what to do.

    The command line prints it as one line and exits with 2.
    """
