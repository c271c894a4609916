"""Whether a data set holds what it says, and whether anything of a patient stands in two of its splits. What is found is never repaired.

One image under two Patient IDs is found by its pixels, whichever way its axes run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

from dicomnode.errors import UsageError
from dicomnode.training.dataset import CaseRow, DataSet, read_case


def check_dataset(dataset: DataSet, *, progress: Callable[[tuple[CaseRow, ...]], Iterable[CaseRow]] = tuple) -> None:
    """Check everything: overlaps between splits, and each case's file against its row.

    Raises:
        UsageError: something is wrong; every fault is named at once, with its cases and files.
    """
    faults = list(overlaps(dataset))
    for row in progress(dataset.cases):
        try:
            read_case(dataset, row)
        except UsageError as error:
            faults.append(str(error))
    refuse(dataset, faults)


def refuse(dataset: DataSet, faults: list[str]) -> None:
    """Raise UsageError if there are faults."""
    if faults:
        raise UsageError(f"the data set {dataset.folder} has {len(faults)} fault(s): {'; '.join(faults)}")


def overlaps(dataset: DataSet) -> Iterator[str]:
    """Yield what two splits have in common, by what the rows say: a patient, a study, or an image."""
    yield from _shared(dataset, "the same patient", lambda row: (row.patient,))
    yield from _shared(dataset, "the same study", lambda row: (row.study,))
    yield from _shared(dataset, "the same pixels", lambda row: tuple(row.pixels_sha256.values()))


def _shared(dataset: DataSet, what: str, marks: Callable[[CaseRow], tuple[str, ...]]) -> Iterator[str]:
    holders: dict[str, list[CaseRow]] = {}
    for row in dataset.cases:
        for mark in set(marks(row)):
            holders.setdefault(mark, []).append(row)
    for rows in holders.values():
        if len({row.split for row in rows}) > 1:
            yield f"{what} in two splits: " + ", ".join(f"{row.case} ({row.split})" for row in rows)
