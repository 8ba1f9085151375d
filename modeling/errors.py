"""The one exception that speaks to the user."""


class UserError(ValueError):
    """Bad input. The message says in one line what is wrong and what to do; a script prints it and exits with status 2."""
