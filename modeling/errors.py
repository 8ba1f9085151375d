"""The one exception that speaks to the user."""


class UserError(ValueError):
    """Bad input: the message says in one line what is wrong and what to do. A script exits with status 2."""
