"""The exception for errors of the user."""


class UserError(ValueError):
    """Bad input: the message says in one line what is wrong and what to do. A script exits with status 2."""
