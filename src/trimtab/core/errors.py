"""The error that users can mend, apart from everything heavy, so that the command line can catch it."""


class InputError(ValueError):
    """Input that a user can mend: the message names the argument, the expectation and the first bad index."""
