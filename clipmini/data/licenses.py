"""Licenses by the names that the Hub has for them, and which of several is the strictest.

The order is a rule of thumb for a card's metadata and no legal advice: it asks how much a license forbids, not whether
two of them can be kept at once. Of share-alike licenses, two mostly cannot.
"""

import difflib
from collections.abc import Iterable

OTHER = "other"  # terms that have no name on the Hub
UNKNOWN = "unknown"  # the Hub's word for a license that is not stated
# From nothing asked to nothing allowed; of two in one line the later counts as the stricter.
_ORDERED_LINES = (
    ("unlicense", "wtfpl", "pddl", "cc0-1.0"),  # no conditions
    ("isc", "zlib", "mit", "bsd", "bsd-2-clause", "bsd-3-clause", "cdla-permissive-2.0", "odc-by", "etalab-2.0"),
    ("apache-2.0", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0"),  # authors named, and changes told
    ("mpl-2.0", "lgpl-2.1", "lgpl-3.0", "cdla-sharing-1.0", "odbl", "cc-by-sa-3.0", "cc-by-sa-4.0"),  # share alike
    ("gpl-2.0", "gpl-3.0", "agpl-3.0"),
    ("openrail", "creativeml-openrail-m", "bigscience-openrail-m"),  # not for every use
    ("cc-by-nc-2.0", "cc-by-nc-3.0", "cc-by-nc-4.0"),  # no commerce
    ("cc-by-nc-sa-2.0", "cc-by-nc-sa-3.0", "cc-by-nc-sa-4.0"),
    ("cc-by-nd-4.0", "cc-by-nc-nd-3.0", "cc-by-nc-nd-4.0"),  # nothing derived
    (OTHER,),
)
_ORDERED = tuple(name for line in _ORDERED_LINES for name in line)
# What else the Hub lists: families, and terms of their own that neither forbid more nor less than others.
_NOT_ORDERED = (
    *("afl-3.0", "apple-amlr", "apple-ascl", "artistic-2.0", "bigcode-openrail-m", "bigscience-bloom-rail-1.0"),
    *("bsd-3-clause-clear", "bsl-1.0", "c-uda", "cc", "cdla-permissive-1.0", "deepfloyd-if-license", "ecl-2.0"),
    *("epl-1.0", "epl-2.0", "eupl-1.1", "eupl-1.2", "fair-noncommercial-research-license", "gemma", "gfdl", "gpl"),
    *("grok2-community", "h-research", "intel-research", "lgpl", "lgpl-lr", "llama2", "llama3", "llama3.1"),
    *("llama3.2", "llama3.3", "llama4", "lppl-1.3c", "ms-pl", "ncsa", "ofl-1.1", "openmdw-1.0", "openmdw-1.1"),
    *("openrail++", "osl-3.0", "postgresql", UNKNOWN),
)
LICENSES = (*_ORDERED, *_NOT_ORDERED)  # all that the Hub lists


def check_license(name: str) -> str:
    """Check a license that a person states.

    Args:
        name: as the Hub writes it, in any case: "apache-2.0", "CC-BY-4.0"; "other" for terms without such a name.

    Returns:
        The name in small letters.

    Raises:
        ValueError: it is not known here; the message names the nearest.
    """
    small = name.lower()
    if small not in LICENSES:
        nearest = difflib.get_close_matches(small, LICENSES, n=1, cutoff=0.0)[0]
        raise ValueError(
            f"license={name!r} is not allowed; the nearest is {nearest!r}. There are {', '.join(LICENSES)}; "
            f"{OTHER!r} is for other terms."
        )
    return small


def strictest(licenses: Iterable[str | None]) -> str | None:
    """Give the strictest of several licenses.

    Args:
        licenses: as the Hub writes them; None, or "unknown", for what has none that is known.

    Returns:
        The strictest; None where one is not known, where there are none, and where several differ of which one has no
        place in the order, so that nobody can tell.
    """
    names = set(licenses)
    if not names or names & {None, UNKNOWN}:
        return None
    if len(names) == 1:
        return names.pop()
    return max(filter(None, names), key=_ORDERED.index) if names <= set(_ORDERED) else None
