"""The one exception a user sees."""

import difflib
import sys
from collections.abc import Iterable


class AlignError(Exception):
    """A mistake in what was asked for, or trouble with the surroundings (a full disk, a damaged file).

    The message says where, what was found, what was expected and what to do. The command line prints it
    without a traceback and ends with exit code 2.
    """


def did_you_mean(given: object, known: Iterable[str]) -> str:
    """What to end a sentence on an unknown name with: " Did you mean 'sft'?", or nothing where no known name is near."""
    real = {name.lower(): name for name in known}
    near = difflib.get_close_matches(str(given).lower(), real, n=1, cutoff=0.5)
    return f" Did you mean {real[near[0]]!r}?" if near else ""


def _told_without_traceback(kind, error, traceback) -> None:
    """What Python calls for an error nobody caught: a recipe script's mistake is told like the command line's."""
    if issubclass(kind, AlignError):
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    sys.__excepthook__(kind, error, traceback)


sys.excepthook = _told_without_traceback
