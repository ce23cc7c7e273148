"""Errors a user can act on."""


class UserError(ValueError):
    """Something the user gave is wrong; the message says what was expected, what came and what to do."""
