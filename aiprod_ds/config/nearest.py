"""The nearest valid name to a misspelt one, as the end of an error message."""

from collections.abc import Collection
from difflib import get_close_matches

_LISTED = 12  # more names than this make a message harder to read than the documentation


def suggestion(name: str, valid: Collection[str]) -> str:
    """Returns what to write instead of `name`: the nearest of `valid`, or all of them when none is near.

    Example: `suggestion("learnig_rate", ["learning_rate", "updates"])` is `"Did you mean 'learning_rate'?"`.
    """
    folded = {candidate.lower(): candidate for candidate in valid}
    close = get_close_matches(name.lower(), list(folded), n=1, cutoff=0.6)
    started = [candidate for candidate in folded if name and candidate.startswith(name.lower())]
    if close or len(started) == 1:
        return f"Did you mean {folded[(close or started)[0]]!r}?"
    if not valid:
        return "Remove it."
    if len(valid) > _LISTED:
        return "Remove it or look the name up in docs/configuration.md."
    return f"Use one of: {', '.join(sorted(valid))}."
