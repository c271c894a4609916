"""The part of the conformance statement on retrieval as its SCU: what is fetched by C-MOVE and C-GET, and what becomes of it.

Must never state what the code doesn't do.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from dicomnode.config import Settings
from dicomnode.dimse.contexts import MAXIMUM_CONTEXTS
from dicomnode.dimse.get import MAXIMUM_OBJECT_BYTES, MAXIMUM_REFUSED
from dicomnode.dimse.move import HEED_SECONDS
from dicomnode.dimse.retrieving import LISTED

STATUSES = (
    ("FF00", "goes on"),
    ("0000", "all was sent; what came is counted in the index"),
    ("B000", "some failed: told with the retrieval"),
    ("FE00", "cancelled"),
    ("A801, or C-MOVE isn't accepted", "tried by C-GET, unless the peer is registered with `--retrieve-by move`"),
    ("any other, no association, or no response", "ended: the analysis goes on, and its report says why nothing was compared"),
)


def retrieve_lines(settings: Settings, table: Callable[[tuple[str, ...], Iterable[tuple[str, ...]]], Iterator[str]]) -> Iterator[str]:
    """Give the lines of the section; `table` renders rows below a head."""
    yield "## Retrieve: SCU"
    yield "Earlier studies of a patient, and images that a peer holds of a study and that did not come, are retrieved where a route says"
    yield f"so: series by series, those that are held in part by SOP Instance UIDs, at most {LISTED} a request. By C-MOVE to this node's"
    yield "AE title where the peer offers it and knows that; else, or if the peer is registered with `--retrieve-by get`, by C-GET."
    yield "A C-GET proposes, with this node as SCP of them (role selection), the SOP classes that C-FIND named at the level IMAGE, else"
    yield "those usual for the modality: each uncompressed first, then in the usual compressed transfer syntaxes, up to"
    yield f"{MAXIMUM_CONTEXTS} contexts. What comes is checked, made safe and answered as by the Storage SCP; an instance of another study"
    yield "or patient than the one asked for is refused (C005, C006)."
    yield f"A retrieval is cancelled (C-CANCEL, and A-ABORT {HEED_SECONDS:g} s later) at the end of its time, above its limits, after"
    yield f"{MAXIMUM_REFUSED} refused instances, and while an urgent study is analysed. One object of a C-GET may have"
    yield f"{MAXIMUM_OBJECT_BYTES // 2**20} MiB."
    limits = settings.priors
    yield f"For the earlier studies of one analysis there are {limits.seconds:g} s (`priors.seconds`), for each"
    yield f"{limits.maximum_instances:,} instances (`priors.maximum_instances`) and {limits.maximum_bytes:,} bytes"
    yield "(`priors.maximum_bytes`)."
    for_missing = settings.missing
    yield f"For missing images a peer is asked {for_missing.tries} times at most (`missing.tries`), each time for {for_missing.seconds:g} s"
    yield f"(`missing.seconds`), where no more than {for_missing.maximum_instances:,} are missing (`missing.maximum_instances`)."
    yield from table(("Status", "Outcome"), STATUSES)
