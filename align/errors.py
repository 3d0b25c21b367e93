"""The one exception a user sees."""


class AlignError(Exception):
    """A mistake in what was asked for, or trouble with the surroundings (a full disk, a damaged file).

    The message says where, what was found, what was expected and what to do. The command line prints it
    without a traceback and ends with exit code 2.
    """
