"""What is evident of a study's completeness, and what follows from it: facts in, a decision with its reasons out.

Reads no clock, no database and no file. Of an image it knows where it lies in its series and acquisition, and nothing of its pixels.

A series tells by itself that images are absent from its middle, never that its end is: for that it takes Images in Acquisition
(0020,1002), or a peer that holds the study. What speaks against a study's completeness makes it wait, and then be closed as incomplete.
"""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from math import gcd
from typing import Any, Literal

from storage.records import Notice, NoticeKind, NoticeState, Plane

# While the association that brings a study is still open, more images are likely: wait this many quiet periods.
OPEN_ASSOCIATION_FACTOR = 5
WAIT_FACTOR = 4  # quiet periods that an evidently incomplete study is waited for, where its route doesn't say
SETTLED_SECONDS = 2.0  # no study closes earlier after its last image, but by a shorter quiet period
ANSWER_SECONDS = 20.0  # after the quiet period, for an answer that is on its way
_LEAST = 3  # images of a series, or places of a stack, that say something of what lies between them
_SAME_PLACE_MM = 0.05
_UNEVEN = 0.2  # of a step between slices: what lies further from a whole number of steps is no even stack
_TOLD = 5  # ranges of absent numbers that are named

Order = Literal["contiguous", "gap", "unknown"]


@dataclass(frozen=True, kw_only=True)
class Acquisition:
    """Images of one acquisition in one series."""

    number: int | None
    images: int
    stated: int  # Images in Acquisition (0020,1002)
    state: Literal["reached", "short", "unknown"]  # unknown: images of other series may be meant, too


@dataclass(frozen=True, kw_only=True)
class SeriesEvidence:
    """What the images of one series tell of those that are absent."""

    series_instance_uid: str
    series_number: int | None
    modality: str
    images: int
    numbers: Order  # of Instance Number
    absent: str  # the Instance Numbers within them that are absent, in words
    slices: Order  # of the places of planes in space
    in_space: bool  # whether the images are planes in space at all
    acquisitions: tuple[Acquisition, ...]  # none where no image states how many there are

    @property
    def contradiction(self) -> str | None:
        """Why images of the series must be absent, in words, or None.

        Numbers and slices must agree where both say something: many a whole series skips numbers, and many a stack has a gap by intent.
        The numbers of images that aren't planes in space say nothing: films are taken again, and the first is thrown away.
        """
        short = [a for a in self.acquisitions if a.state == "short"]
        if short:
            of = "" if short[0].number is None else f" of acquisition {short[0].number}"
            return f"{self.named}: {short[0].images} of {short[0].stated} images{of}"
        if self.numbers == "gap" and self.slices != "contiguous" and self.in_space:
            where = ", where the slices have a gap" if self.slices == "gap" else ""
            return f"{self.named}: Instance Number {self.absent}{where}"
        if self.numbers == "unknown" and self.slices == "gap":
            return f"{self.named}: the slices have a gap"
        return None

    @property
    def whole(self) -> bool:
        """Whether each acquisition of the series has all the images that it states."""
        return bool(self.acquisitions) and {a.state for a in self.acquisitions} == {"reached"} and self.contradiction is None

    @property
    def named(self) -> str:
        """What a person calls it."""
        return "a series without a number" if self.series_number is None else f"series {self.series_number}"


@dataclass(frozen=True, kw_only=True)
class PeerEvidence:
    """What a peer that was asked holds of the study."""

    peer: str
    state: Literal["asked", "answered", "unknown", "silent"]  # unknown: it holds no such study; silent: it gave no answer
    instances: int = 0  # images that it holds
    absent: int = 0  # of them, not received here
    reason: str = ""  # why there is no answer


@dataclass(frozen=True, kw_only=True)
class NamedSeries:
    """Images of a series that an announcement names."""

    series_instance_uid: str
    images: int
    absent: int  # of them, not received here


@dataclass(frozen=True, kw_only=True)
class NoticeEvidence:
    """What a modality (MPPS) or an archive (instance availability) has announced of the study."""

    kind: NoticeKind
    ae_title: str
    state: NoticeState
    series: tuple[NamedSeries, ...]

    @property
    def images(self) -> int:
        """How many it names."""
        return sum(series.images for series in self.series)

    @property
    def contradiction(self) -> str | None:
        """Why images must still come, in words, or None."""
        if self.state == "in progress":
            return f"{self.ae_title} has not ended its procedure step"
        absent = sum(series.absent for series in self.series)
        return f"{self.ae_title} names {absent} image(s) that aren't here" if absent else None

    def has_all_of(self, series: SeriesEvidence) -> bool:
        """Whether it names, of a step that has ended or of what is available, exactly the images of the series that came."""
        named = next((one for one in self.series if one.series_instance_uid == series.series_instance_uid), None)
        return self.state != "in progress" and named is not None and (named.images, named.absent) == (series.images, 0)


@dataclass(frozen=True, kw_only=True)
class FetchEvidence:
    """What was asked of a peer for the images that it holds and that did not come."""

    peer: str
    state: Literal["asked", "ended"]
    tries: int
    instances: int  # that the last try asked for
    arrived: int  # by all tries
    reason: str = ""  # why the last try didn't bring all


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Everything that is known of whether a study is complete."""

    images: int
    released: bool  # the association that brought the last image has ended
    silent_seconds: float  # since the last image
    series: tuple[SeriesEvidence, ...]
    peers: tuple[PeerEvidence, ...] = ()
    notices: tuple[NoticeEvidence, ...] = ()
    fetched: tuple[FetchEvidence, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Rules:
    """What the study's routes make of that."""

    quiet_seconds: float
    longest_wait_seconds: float | None = None  # after the quiet period, while images are evidently absent; None: four quiet periods
    early: bool = False  # whether it may close before its quiet period is over


@dataclass(frozen=True, kw_only=True)
class Decision:
    """Whether to close the study now, and why, or why not yet."""

    closes: bool
    reason: str
    incomplete: tuple[str, ...] = ()  # what speaks against its being complete


def decide(evidence: Evidence, rules: Rules) -> Decision:
    """Say whether a study is closed now.

    It closes after its quiet period, of which an association that is still open makes five; earlier where the routes say so and it is
    proven complete; later, and as incomplete, where images are evidently absent or a procedure step goes on. A peer that gives no answer
    is no evidence. After a discontinued step what is there is all: it isn't waited for more, and that is said.
    """
    decision = _decide(evidence, rules)
    remarks = tuple(f"{notice.ae_title} discontinued its procedure step" for notice in evidence.notices if notice.state == "discontinued")
    if not remarks or not decision.closes:
        return decision
    words = "; ".join(remarks)
    reason = f"{decision.reason}; {words}" if decision.incomplete else f"incomplete: {words}; {decision.reason}"
    return replace(decision, reason=reason, incomplete=(*decision.incomplete, *remarks))


def _decide(evidence: Evidence, rules: Rules) -> Decision:
    quiet = rules.quiet_seconds if evidence.released else rules.quiet_seconds * OPEN_ASSOCIATION_FACTOR
    silent = evidence.silent_seconds
    against = contradictions(evidence)
    if against:
        wait = rules.longest_wait_seconds if rules.longest_wait_seconds is not None else rules.quiet_seconds * WAIT_FACTOR
        longest = max(quiet, rules.quiet_seconds + wait)
        words = "incomplete: " + "; ".join(against)
        if silent >= longest:
            return Decision(closes=True, reason=f"{words}; quiet for {longest:g} s", incomplete=against)
        return Decision(closes=False, reason=words, incomplete=against)
    proof = _proof(evidence) if rules.early and evidence.released and silent >= min(SETTLED_SECONDS, quiet) else None
    if proof is not None:
        return Decision(closes=True, reason=f"association released and {proof}")
    if silent < quiet:
        return Decision(closes=False, reason=f"not quiet for {quiet:g} s yet")
    asked = [peer.peer for peer in evidence.peers if peer.state == "asked"]
    if asked and silent < quiet + ANSWER_SECONDS:
        return Decision(closes=False, reason=f"{asked[0]} is asked what it holds")
    words = f"association released and quiet for {quiet:g} s" if evidence.released else f"quiet for {quiet:g} s, association not released"
    return Decision(closes=True, reason="; ".join([words, *map(_words, evidence.peers)]))


def contradictions(evidence: Evidence) -> tuple[str, ...]:
    """Return what speaks against the study's being complete, in words without patient data."""
    peers = [f"{peer.peer} holds {peer.absent} image(s) that aren't here" for peer in evidence.peers if peer.absent]
    found = [series.contradiction for series in evidence.series] + [notice.contradiction for notice in evidence.notices]
    return tuple([reason for reason in found if reason is not None] + peers)


def complete_by_itself(
    series: SeriesEvidence, silent_seconds: float, quiet_seconds: float, notices: Sequence[NoticeEvidence] = ()
) -> str | None:
    """Return what shows that a series is complete while its study is still being received, in words, or None if nothing does.

    It has all images that it states, or that were announced; or, of planes in space, neither its numbers nor its slices have a gap and
    it is quiet for so long.
    """
    if series.contradiction is not None or silent_seconds < min(SETTLED_SECONDS, quiet_seconds):
        return None
    if series.whole:
        return f"{series.named} has as many images as it states"
    announced = [notice.ae_title for notice in notices if notice.has_all_of(series)]
    if announced:
        return f"{series.named} has the {series.images} image(s) that {announced[0]} names"
    if series.numbers == series.slices == "contiguous" and silent_seconds >= quiet_seconds:
        return f"neither the numbers nor the slices of {series.named} have a gap, and it was quiet for {quiet_seconds:g} s"
    return None


def after_fetches(decision: Decision, fetched: Iterable[FetchEvidence]) -> Decision:
    """Let a study wait for what is on its way from a peer; say of one that is closed what was fetched, and what was asked for in vain."""
    said = []
    for fetch in fetched if decision.closes else ():
        if fetch.state == "asked":
            return Decision(
                closes=False, reason=f"{fetch.instances} image(s) are fetched from {fetch.peer}", incomplete=decision.incomplete
            )
        said += [f"{fetch.arrived} image(s) were fetched from {fetch.peer}"] if fetch.arrived else []
        said += [f"{fetch.peer} was asked {fetch.tries} time(s) for what it holds"] if decision.incomplete else []
    incomplete = (*decision.incomplete, *said) if decision.incomplete else ()
    return replace(decision, reason="; ".join([decision.reason, *said]), incomplete=incomplete)


def as_json(evidence: Evidence, decision: Decision) -> dict[str, Any]:
    """Return the record that is kept with a revision."""
    series = [{**asdict(one), "contradiction": one.contradiction} for one in evidence.series]
    record = {**asdict(evidence), "series": series, "silent_seconds": round(evidence.silent_seconds, 3), "incomplete": decision.incomplete}
    known: dict[str, Any] = json.loads(json.dumps(record))  # lists where there were tuples, as it will be when it is read again
    return known


def notice_evidence(notices: Sequence[Notice], absent: Collection[str]) -> tuple[NoticeEvidence, ...]:
    """Return what was announced of a study; `absent` are those of the named images that aren't here.

    An archive may announce a study part by part: what one AE title says is available is put together.
    """
    absent = set(absent)
    together: dict[tuple[str, ...], tuple[Notice, dict[str, set[str]]]] = {}
    for notice in notices:
        key = (notice.ae_title,) if notice.kind == "ian" else (notice.ae_title, notice.sop_instance_uid)
        _, series = together.setdefault(key, (notice, {}))
        for uid, images in notice.images.items():
            series.setdefault(uid, set()).update(images)
    return tuple(
        NoticeEvidence(
            kind=first.kind,
            ae_title=first.ae_title,
            state=first.state,
            series=tuple(
                NamedSeries(series_instance_uid=uid, images=len(images), absent=len(images & absent)) for uid, images in series.items()
            ),
        )
        for first, series in together.values()
    )


def series_evidence(planes: Iterable[Plane]) -> tuple[SeriesEvidence, ...]:
    """Return what each series of a study tells by its images, in the order of their arrival."""
    by_series: dict[str, list[Plane]] = {}
    for plane in planes:
        by_series.setdefault(plane.series_instance_uid, []).append(plane)
    acquisitions = _acquisitions(by_series)
    found = []
    for uid, images in by_series.items():
        numbers, absent = order_of_numbers([plane.instance_number for plane in images])
        found.append(
            SeriesEvidence(
                series_instance_uid=uid,
                series_number=images[0].series_number,
                modality=images[0].modality,
                images=len(images),
                numbers=numbers,
                absent=absent,
                slices=order_of_slices(images),
                in_space=all(plane.position is not None for plane in images),
                acquisitions=acquisitions[uid],
            )
        )
    return tuple(found)


def order_of_numbers(numbers: Sequence[int | None]) -> tuple[Order, str]:
    """Say whether Instance Numbers follow on each other, in steps of any one size, and which within them are absent, in words."""
    known = sorted({number for number in numbers if number is not None})
    if None in numbers or len(known) < _LEAST:
        return "unknown", ""
    step = gcd(*(b - a for a, b in pairwise(known)))
    holes = [(a + step, b - step) for a, b in pairwise(known) if b - a > step]
    if not holes:
        return "contiguous", ""
    words = [str(first) if first == last else f"{first} to {last}" for first, last in holes[:_TOLD]]
    more = [f"{len(holes) - _TOLD} more range(s)"] if len(holes) > _TOLD else []
    return "gap", ", ".join(words + more) + (" is absent" if len(holes) == 1 and holes[0][0] == holes[0][1] else " are absent")


def order_of_slices(planes: Sequence[Plane]) -> Order:
    """Say whether the planes of a series, by their direction, lie at even distances, with equally many at each place."""
    directions: dict[str, list[float]] = defaultdict(list)
    for plane in planes:
        if plane.position is not None:
            directions[plane.orientation].append(plane.position)
    orders = {_order_of_places(positions) for positions in directions.values()}
    if "gap" in orders:
        return "gap"
    return "contiguous" if orders == {"contiguous"} else "unknown"


def _order_of_places(positions: Sequence[float]) -> Order:
    images = Counter[float]()  # by place
    for position in sorted(positions):
        last = next(reversed(images), None)
        images[position if last is None or position - last > _SAME_PLACE_MM else last] += 1
    if len(images) < _LEAST:
        return "unknown"
    steps = [b - a for a, b in pairwise(images)]
    step = sorted(steps)[len(steps) // 10]  # the least, but for a few that lie nearer by chance
    counts = [distance / step for distance in steps]
    if any(abs(count - max(1, round(count))) > _UNEVEN for count in counts):
        return "unknown"
    return "gap" if any(round(count) > 1 for count in counts) or len(set(images.values())) > 1 else "contiguous"


def _acquisitions(by_series: dict[str, list[Plane]]) -> dict[str, tuple[Acquisition, ...]]:
    """The acquisitions of each series whose images state how many there are.

    An acquisition that was reconstructed to several series may count the images of all of them. So a series is short only if, with what
    other series hold of its acquisition that isn't whole by itself, there are still too few.
    """
    images: Counter[tuple[str, int | None]] = Counter()
    stated: dict[tuple[str, int | None], int] = {}
    for uid, planes in by_series.items():
        for plane in planes:
            key = uid, plane.acquisition_number
            images[key] += 1
            if plane.images_in_acquisition is not None and plane.images_in_acquisition > 0:
                stated[key] = max(stated.get(key, 0), plane.images_in_acquisition)
    together: Counter[int | None] = Counter()
    for key, count in images.items():
        if count != stated.get(key):
            together[key[1]] += count
    found: dict[str, list[Acquisition]] = {uid: [] for uid in by_series}
    for (uid, number), wanted in stated.items():
        count = images[uid, number]
        state: Literal["reached", "short", "unknown"] = (
            "reached" if count >= wanted else "short" if together[number] < wanted else "unknown"
        )
        found[uid].append(Acquisition(number=number, images=count, stated=wanted, state=state))
    return {uid: tuple(acquisitions) for uid, acquisitions in found.items()}


def _proof(evidence: Evidence) -> str | None:
    """What proves a study that nothing speaks against complete, or None.

    What was announced, where each series that came is named, image by image; else each peer that is asked; else each series by itself.
    """
    if evidence.notices and evidence.series and all(any(n.has_all_of(s) for n in evidence.notices) for s in evidence.series):
        return "; ".join(f"all {notice.images} image(s) that {notice.ae_title} names are here" for notice in evidence.notices)
    if evidence.peers:
        if all(peer.state == "answered" and peer.instances for peer in evidence.peers):
            return "; ".join(map(_words, evidence.peers))
        return None
    if evidence.series and all(series.whole for series in evidence.series):
        return "each acquisition has as many images as it states"
    return None


def _words(peer: PeerEvidence) -> str:
    return {
        "asked": f"{peer.peer} did not answer in time what it holds",
        "answered": f"{peer.peer} holds no image that isn't here",
        "unknown": f"{peer.peer} holds no such study",
        "silent": f"{peer.peer} did not say what it holds: {peer.reason}",
    }[peer.state]
