"""What to say of a name that is not known."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x', 'y' or 'z'?` for the nearest three known names, or a list, five at most, where none is
    near."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=3)
    if near:
        *others, last = map(repr, near)
        return f"; did you mean {', '.join(others) + ' or ' if others else ''}{last}?"
    listed = known if len(known) <= 5 else difflib.get_close_matches(name, known, n=5, cutoff=0.0)
    more = f" and {len(known) - len(listed)} more" if len(known) > len(listed) else ""
    return f"; known: {', '.join(listed)}{more}"
