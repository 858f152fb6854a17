"""The one kind of error a user can mend."""


class UserError(ValueError):
    """Says in one line what is wrong, which value, and the way out. The CLI exits with code 2."""
