"""What a data set is built from: cases that can be read, and whose they are. Identifiers end here: only their hashes go further."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from dicomnode.findings import Volume
from dicomnode.training.dataset import Mask


@dataclass(frozen=True, kw_only=True)
class AnnotatedCase:
    """A case's images and what somebody marked on them.

    `masks` are bool (k, r, c) on the grid of the first channel, by label; a label that isn't in it was not marked. An empty mask of a
    label in `looked_for` says that there is none of it; another empty mask says nothing, and `dataset_build` decides.
    """

    volumes: Mapping[str, Volume]  # by channel, the first channel first, on one grid
    masks: Mapping[str, Mask]
    looked_for: frozenset[str] = frozenset()
    attributes: Mapping[str, str | float | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True)
class Source:
    """A case that can be read. `read` raises UsageError or NotEligible; what is wrong with a file names the file."""

    name: str  # a file, folder or series: shown to whoever builds, never written
    patient: str  # Patient ID, or what stands for it: never written
    study: str  # Study Instance UID, or what stands for it: never written
    kind: str  # what it was made from, without names: written
    modality: str
    channels: tuple[str, ...]
    labels: tuple[str, ...]  # that may be marked
    read: Callable[[], AnnotatedCase]
