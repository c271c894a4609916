r"""What the node holds, asked by DICOM attributes: the queries of C-FIND and QIDO-RS, and the objects that a retrieval names.

Images and results count alike; a result that came back counts once. Must never build SQL from a key's text, and never answer more
than it was asked to.

Keys are attribute keywords with values as PS3.4 C.2.2.2 has them: empty or `*` matches all; `\` separates values of which one must
match; `*` and `?` are wildcards of text; `A-B`, `A-` and `-B` are ranges of dates and times. Text is matched by case, Patient Name by
neither case nor accents, each component group for itself. A key of a level below the one asked for is no key.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from sqlalchemy import (
    ARRAY,
    JSON,
    BigInteger,
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    bindparam,
    exists,
    func,
    literal,
    or_,
    select,
    true,
    union,
    union_all,
)

from storage.database import Database
from storage.errors import StorageError
from storage.schema import INSTANCE, PATIENT, RESULT, SERIES, STUDY, WireText
from storage.times import moments

Level = Literal["PATIENT", "STUDY", "SERIES", "IMAGE"]
Attributes = dict[str, str | int | tuple[str, ...] | None]
Condition = ColumnElement[bool]

LEVELS: Final[tuple[Level, ...]] = ("PATIENT", "STUDY", "SERIES", "IMAGE")
MAXIMUM_TEXT: Final = 1024  # characters of a key that is no list of UIDs
MAXIMUM_UIDS: Final = 20_000
_BATCH: Final = 500

_UID: Final = re.compile(r"[0-9]+(\.[0-9]+)*", re.ASCII)
_DATE: Final = re.compile(r"[0-9]{8}", re.ASCII)
_TIME: Final = re.compile(r"[0-9]{2}([0-9]{2}([0-9]{2}(\.[0-9]{1,6})?)?)?", re.ASCII)
_NUMBER: Final = re.compile(r"[+-]?[0-9]{1,10}", re.ASCII)
_STARS: Final = re.compile(r"\*{2,}")
_END_OF_NAME: Final = re.compile(r"[\^ ]+$")


class BadQuery(StorageError):
    """A key's value is none that its attribute can be matched with. `keyword` names it; the message holds nothing of the value."""

    def __init__(self, keyword: str, why: str) -> None:
        super().__init__(f"{keyword} {why}")
        self.keyword = keyword


@dataclass(frozen=True, kw_only=True)
class Held:
    """One object that the node holds, an image or a result."""

    sop_class_uid: str
    sop_instance_uid: str
    transfer_syntax_uid: str
    series_instance_uid: str
    study_instance_uid: str
    object_id: str
    size: int  # bytes of the whole file


def folded(name: str) -> str:
    """Return a PN as names are compared: without case, accents and empty components, each group between two `=`."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if not "\u0300" <= c <= "\u036f")
    groups = [_END_OF_NAME.sub("", group).strip() for group in unicodedata.normalize("NFC", plain).split("=")]
    return f"={'='.join(groups)}="


class Query:
    """Queries over what is stored. Any number of threads may use it."""

    def __init__(self, database: Database) -> None:
        self._database = database

    def find(
        self, level: Level, keys: Mapping[str, str], *, include: Collection[str] | None = None, limit: int = 1000, offset: int = 0
    ) -> list[Attributes]:
        """Return the entities of a level that match all keys, as values by keyword, oldest arrival first.

        Each has the single values of its level and of those above, and of COUNTED of its level what `include` names, or all. A value
        that isn't known is None or "". Of `keys` those that are not in MATCHED of the level are ignored.

        Raises:
            BadQuery: a key's value can't be matched.
        """
        statement = _SELECT[level](self._conditions(level, keys)).limit(limit).offset(offset)
        counted = COUNTED[level] if include is None else COUNTED[level] & set(include)
        with self._database.reading() as connection:
            rows = [dict(row) for row in connection.execute(statement).mappings()]
            for start in range(0, len(rows), _BATCH):
                _count(connection, level, rows[start : start + _BATCH], counted)
        return [{keyword: value for keyword, value in row.items() if not keyword.startswith("_")} for row in rows]

    def held(self, keys: Mapping[str, str], *, limit: int) -> list[Held]:
        """Return the objects that match all keys, at most so many: of a study the images in the order of arrival, then the results.

        Raises:
            BadQuery: a key's value can't be matched.
        """
        statement = _select_images(self._conditions("IMAGE", keys)).limit(limit)
        with self._database.reading() as connection:
            return [
                Held(
                    sop_class_uid=row["SOPClassUID"],
                    sop_instance_uid=row["SOPInstanceUID"],
                    transfer_syntax_uid=row["AvailableTransferSyntaxUID"],
                    series_instance_uid=row["SeriesInstanceUID"],
                    study_instance_uid=row["StudyInstanceUID"],
                    object_id=row["_object_id"],
                    size=row["_size"],
                )
                for row in connection.execute(statement).mappings()
            ]

    def _conditions(self, level: Level, keys: Mapping[str, str]) -> Conditions:
        kinds = {keyword: _KIND[keyword] for keyword in MATCHED[level]}
        return Conditions(self._database, keys, kinds=kinds, compared=_COMPARED)


class Conditions:
    """What the keys of a query demand of columns: the same keys are asked of images and of results."""

    def __init__(
        self, database: Database, keys: Mapping[str, str], *, kinds: Mapping[str, str], compared: Mapping[str, Any] | None = None
    ) -> None:
        """`kinds` says of each key that is matched how, the others are ignored; `compared` where another column is looked at than shown."""
        self._database = database
        self._compared = compared or {}
        self._kinds = kinds
        self._keys = {keyword: keys[keyword] for keyword in keys if keyword in kinds}

    def on(self, columns: Mapping[str, Any]) -> Iterator[Condition]:
        """Give the conditions on those of the keys that `columns` has."""
        for keyword, column in columns.items():
            if keyword in self._keys:
                text = self._keys[keyword].strip(" \0")
                if text.strip("*"):
                    yield from self._one(keyword, self._compared.get(keyword, column), text)

    def _one(self, keyword: str, column: Any, text: str) -> Iterator[Condition]:
        kind = self._kinds[keyword]
        if kind == "uid":
            yield self._uids(keyword, column, text)
            return
        if len(text) > MAXIMUM_TEXT:
            raise BadQuery(keyword, "is too long")
        values = [value.strip() for value in text.split("\\")]
        if all(value.strip("*") for value in values):
            yield or_(*(_MATCH[kind](self, keyword, column, value) for value in values))

    def _uids(self, keyword: str, column: Any, text: str) -> Condition:
        uids = [uid.strip(" \0") for uid in text.split("\\")]
        if len(uids) > MAXIMUM_UIDS:
            raise BadQuery(keyword, f"names more than {MAXIMUM_UIDS} UIDs")
        if not all(len(uid) <= 64 and _UID.fullmatch(uid) for uid in uids):
            raise BadQuery(keyword, "is no UID and no list of UIDs")
        if len(uids) == 1:
            return _condition(column == uids[0])
        if self._database.is_sqlite:
            listed = func.json_each(bindparam(None, uids, type_=JSON)).table_valued("value")
            return _condition(column.in_(select(listed.c.value)))
        return _condition(column == func.any(bindparam(None, uids, type_=ARRAY(Text))))

    def text(self, _keyword: str, column: Any, value: str) -> Condition:
        """Single value and wildcard matching, by case (PS3.4 C.2.2.2.1 and C.2.2.2.4)."""
        return self._like(column, value) if "*" in value or "?" in value else _condition(column == bindparam(None, value, type_=WireText))

    def name(self, _keyword: str, column: Any, value: str) -> Condition:
        """Match one component group, or all of them, without case and accents."""
        wanted = folded(value)
        if "=" in value:
            return self._like(column, wanted)
        whole = self._like(column, f"*{wanted}*")
        bare = re.sub(r"[\^*]+=$", "=", wanted)  # "Doe^*" is Doe too, whose empty components nobody wrote
        return or_(whole, self._like(column, f"*{bare}*")) if wanted.endswith("^*=") else whole

    def date(self, keyword: str, column: Any, value: str) -> Condition:
        """Single value and range matching (PS3.4 C.2.2.2.5)."""
        first, is_range, last = value.replace(".", "").partition("-")
        if not (first or last) or not all(not part or _DATE.fullmatch(part) for part in (first, last)):
            raise BadQuery(keyword, "is neither a date nor a range of dates")
        return self._between(column, first, last if is_range else first)

    def time(self, keyword: str, column: Any, value: str) -> Condition:
        """Single value and range matching; what a time leaves open, like its seconds, may be anything."""
        first, is_range, last = value.replace(":", "").partition("-")
        if not (first or last) or not all(not part or _TIME.fullmatch(part) for part in (first, last)):
            raise BadQuery(keyword, "is neither a time nor a range of times")
        last = last if is_range else first
        whole, _, fraction = last.partition(".")
        return self._between(column, first, f"{whole:9<6}.{fraction:9<6}" if last else "")

    def datetime(self, keyword: str, column: Any, value: str) -> Condition:
        """Single value and range matching of a DT (PS3.4 C.2.2.2.5) against times that are kept as such."""
        try:
            first, last = moments(value)
        except ValueError as error:
            raise BadQuery(keyword, "is neither a date and time nor a range of them") from error
        return and_(true() if first is None else column >= first, true() if last is None else column <= last)

    def number(self, keyword: str, column: Any, value: str) -> Condition:
        """Single value matching of an IS."""
        if not _NUMBER.fullmatch(value):
            raise BadQuery(keyword, "is no integer")
        return _condition(column == int(value))

    def _between(self, column: Any, first: str, last: str) -> Condition:
        return and_(column != "", column >= first, column <= last) if last else and_(column != "", column >= first)

    def _like(self, column: Any, pattern: str) -> Condition:
        pattern = _STARS.sub("*", pattern)
        if self._database.is_sqlite:
            return _condition(column.op("GLOB")(bindparam(None, pattern.replace("[", "[[]"), type_=WireText)))
        for special in "\\%_":
            pattern = pattern.replace(special, f"\\{special}")
        return _condition(column.like(bindparam(None, pattern.replace("*", "%").replace("?", "_"), type_=WireText), escape="\\"))


def _condition(condition: Any) -> Condition:
    """Return the condition by its type, which operators on columns of unknown type don't tell."""
    return condition  # type: ignore[no-any-return]  # it is one


_MATCH: Final[Mapping[str, Callable[[Conditions, str, Any, str], Condition]]] = {
    "text": Conditions.text,
    "name": Conditions.name,
    "date": Conditions.date,
    "time": Conditions.time,
    "datetime": Conditions.datetime,
    "number": Conditions.number,
}

# What can be matched at each level, and how; all of it is returned, too.
_KIND: Final[Mapping[str, str]] = {
    "PatientID": "text",
    "PatientName": "name",
    "PatientBirthDate": "date",
    "PatientSex": "text",
    "StudyInstanceUID": "uid",
    "StudyDate": "date",
    "StudyTime": "time",
    "AccessionNumber": "text",
    "StudyID": "text",
    "StudyDescription": "text",
    "ReferringPhysicianName": "text",
    "ModalitiesInStudy": "text",
    "SeriesInstanceUID": "uid",
    "Modality": "text",
    "SeriesNumber": "number",
    "SeriesDescription": "text",
    "BodyPartExamined": "text",
    "SOPInstanceUID": "uid",
    "SOPClassUID": "uid",
    "InstanceNumber": "number",
}
_BELOW: Final[Mapping[Level, str]] = {"PATIENT": "StudyInstanceUID", "STUDY": "SeriesInstanceUID", "SERIES": "SOPInstanceUID"}


def _up_to(level: Level) -> frozenset[str]:
    keywords = list(_KIND)
    return frozenset(keywords[: keywords.index(_BELOW[level])] if level in _BELOW else keywords)


MATCHED: Final[Mapping[Level, frozenset[str]]] = {level: _up_to(level) for level in LEVELS}
COUNTED: Final[Mapping[Level, frozenset[str]]] = {
    "PATIENT": frozenset({"NumberOfPatientRelatedStudies", "NumberOfPatientRelatedSeries", "NumberOfPatientRelatedInstances"}),
    "STUDY": frozenset({"ModalitiesInStudy", "NumberOfStudyRelatedSeries", "NumberOfStudyRelatedInstances"}),
    "SERIES": frozenset({"NumberOfSeriesRelatedInstances"}),
    "IMAGE": frozenset(),
}

_OF_PATIENT: Final[Mapping[str, Any]] = {"PatientID": PATIENT.c.patient_id, "PatientName": PATIENT.c.patient_name}
_OF_STUDY: Final[Mapping[str, Any]] = {
    **_OF_PATIENT,
    "PatientBirthDate": STUDY.c.birth_date,
    "PatientSex": STUDY.c.sex,
    "StudyInstanceUID": STUDY.c.study_instance_uid,
    "StudyDate": STUDY.c.study_date,
    "StudyTime": STUDY.c.study_time,
    "AccessionNumber": STUDY.c.accession_number,
    "StudyID": STUDY.c.study_id,
    "StudyDescription": STUDY.c.study_description,
    "ReferringPhysicianName": STUDY.c.referring_physician,
}
_OF_SERIES: Final[Mapping[str, Any]] = {
    "SeriesInstanceUID": SERIES.c.series_instance_uid,
    "Modality": SERIES.c.modality,
    "SeriesNumber": SERIES.c.series_number,
    "SeriesDescription": SERIES.c.series_description,
    "BodyPartExamined": SERIES.c.body_part,
}
_OF_INSTANCE: Final[Mapping[str, Any]] = {
    "SOPInstanceUID": INSTANCE.c.sop_instance_uid,
    "SOPClassUID": INSTANCE.c.sop_class_uid,
    "InstanceNumber": INSTANCE.c.instance_number,
    "AvailableTransferSyntaxUID": INSTANCE.c.transfer_syntax_uid,
}
_SERIES_OF_RESULT: Final[Mapping[str, Any]] = {
    "SeriesInstanceUID": RESULT.c.series_instance_uid,
    "Modality": RESULT.c.modality,
    "SeriesNumber": RESULT.c.series_number,
    "SeriesDescription": RESULT.c.series_description,
    "BodyPartExamined": literal("", Text),
}
_INSTANCE_OF_RESULT: Final[Mapping[str, Any]] = {
    "SOPInstanceUID": RESULT.c.sop_instance_uid,
    "SOPClassUID": RESULT.c.sop_class_uid,
    "InstanceNumber": RESULT.c.instance_number,
    "AvailableTransferSyntaxUID": RESULT.c.transfer_syntax_uid,
}
_COMPARED: Final[Mapping[str, Any]] = {"PatientName": PATIENT.c.folded_name}  # where another column is compared than is shown

_RESULTS = and_(RESULT.c.study_instance_uid == STUDY.c.study_instance_uid, RESULT.c.removed_at.is_(None))
# Results that haven't come back, and whose series hasn't.
_NO_INSTANCE = ~exists().where(INSTANCE.c.sop_instance_uid == RESULT.c.sop_instance_uid)
_NO_SERIES = ~exists().where(SERIES.c.study_row == STUDY.c.id, SERIES.c.series_instance_uid == RESULT.c.series_instance_uid)
_AFTER_IMAGES = 2**62


def _labelled(columns: Mapping[str, Any]) -> list[Any]:
    return [column.label(keyword) for keyword, column in columns.items()]


def _select_patients(conditions: Conditions) -> Any:
    studies = STUDY.c.patient_row == PATIENT.c.id
    of_study = {keyword: _OF_STUDY[keyword] for keyword in ("PatientBirthDate", "PatientSex")}
    known = [
        select(func.max(column)).where(studies).correlate(PATIENT).scalar_subquery().label(keyword) for keyword, column in of_study.items()
    ]
    has_study = exists().where(studies, STUDY.c.holds, *conditions.on(of_study)).correlate(PATIENT)
    statement = select(PATIENT.c.id.label("_patient"), *_labelled(_OF_PATIENT), *known)
    return statement.where(has_study, *conditions.on(_OF_PATIENT)).order_by(PATIENT.c.id)


def _select_studies(conditions: Conditions) -> Any:
    statement = (
        select(STUDY.c.id.label("_study"), *_labelled(_OF_STUDY)).join_from(STUDY, PATIENT).where(STUDY.c.holds, *conditions.on(_OF_STUDY))
    )
    of_series = list(conditions.on({"ModalitiesInStudy": SERIES.c.modality}))
    if of_series:
        of_result = conditions.on({"ModalitiesInStudy": RESULT.c.modality})
        images = exists().where(SERIES.c.study_row == STUDY.c.id, *of_series).correlate(STUDY)
        statement = statement.where(or_(images, exists().where(_RESULTS, *of_result).correlate(STUDY)))
    return statement.order_by(STUDY.c.id)


def _select_series(conditions: Conditions) -> Any:
    of_study = list(conditions.on(_OF_STUDY))
    study = [STUDY.c.id.label("_study"), *_labelled(_OF_STUDY)]
    received = select(*study, *_labelled(_OF_SERIES)).join_from(STUDY, PATIENT).join(SERIES, SERIES.c.study_row == STUDY.c.id)
    made = select(*study, *_labelled(_SERIES_OF_RESULT)).join_from(STUDY, PATIENT).join(RESULT, _RESULTS)
    both = union(
        received.where(*of_study, *conditions.on(_OF_SERIES)),
        made.where(*of_study, RESULT.c.series_instance_uid.is_not(None), _NO_SERIES, *conditions.on(_SERIES_OF_RESULT)),
    )
    return both.order_by("_study", "SeriesNumber", "SeriesInstanceUID")


def _select_images(conditions: Conditions) -> Any:
    of_study = list(conditions.on(_OF_STUDY))
    images, results = {**_OF_SERIES, **_OF_INSTANCE}, {**_SERIES_OF_RESULT, **_INSTANCE_OF_RESULT}
    study = [STUDY.c.id.label("_study"), *_labelled(_OF_STUDY)]
    of_image = [INSTANCE.c.id.label("_arrival"), INSTANCE.c.object_id.label("_object_id"), INSTANCE.c.size.label("_size")]
    of_result = [literal(_AFTER_IMAGES, BigInteger).label("_arrival"), RESULT.c.object_id.label("_object_id"), RESULT.c.size.label("_size")]
    received = select(*study, *_labelled(images), *of_image).join_from(STUDY, PATIENT).join(SERIES, SERIES.c.study_row == STUDY.c.id)
    made = select(*study, *_labelled(results), *of_result).join_from(STUDY, PATIENT).join(RESULT, _RESULTS)
    both = union_all(
        received.join(INSTANCE, INSTANCE.c.series_row == SERIES.c.id).where(*of_study, *conditions.on(images)),
        made.where(*of_study, RESULT.c.series_instance_uid.is_not(None), _NO_INSTANCE, *conditions.on(results)),
    )
    return both.order_by("_study", "_arrival", "SOPInstanceUID")


_SELECT: Final[Mapping[Level, Callable[[Conditions], Any]]] = {
    "PATIENT": _select_patients,
    "STUDY": _select_studies,
    "SERIES": _select_series,
    "IMAGE": _select_images,
}


def _count(connection: Connection, level: Level, rows: Sequence[dict[str, Any]], counted: Collection[str]) -> None:
    """Add what is counted over the parts of each entity."""
    if level == "SERIES":
        studies, uids = {row["_study"] for row in rows}, {row["SeriesInstanceUID"] for row in rows}
        numbers = _added(connection, _instances_of_series(studies, uids)) if counted else {}
        for row in rows if counted else ():
            row["NumberOfSeriesRelatedInstances"] = numbers.get((row["_study"], row["SeriesInstanceUID"]), 0)
        return
    of, group = ("_patient", STUDY.c.patient_row) if level == "PATIENT" else ("_study", STUDY.c.id)
    keys = [row[of] for row in rows]
    for keyword in counted:
        if keyword == "ModalitiesInStudy":
            modalities = _modalities(connection, keys)
            for row in rows:
                row[keyword] = tuple(sorted(modalities.get(row[of], ())))
            continue
        numbers = _added(connection, [statement.where(group.in_(keys)).group_by(group) for statement in _counting(keyword, group)])
        for row in rows:
            row[keyword] = numbers.get((row[of],), 0)


def _counting(keyword: str, group: Any) -> list[Select[Any]]:
    """Statements whose numbers, added, are those of a keyword for each group of studies."""
    if keyword.endswith("Studies"):
        return [select(group, func.count()).where(STUDY.c.holds)]
    if keyword.endswith("Series"):
        return [
            select(group, func.count()).join_from(STUDY, SERIES, SERIES.c.study_row == STUDY.c.id),
            select(group, func.count(RESULT.c.series_instance_uid.distinct())).join_from(STUDY, RESULT, _RESULTS).where(_NO_SERIES),
        ]
    return [
        select(group, func.count()).join_from(STUDY, INSTANCE, INSTANCE.c.study_row == STUDY.c.id),
        select(group, func.count(RESULT.c.series_instance_uid)).join_from(STUDY, RESULT, _RESULTS).where(_NO_INSTANCE),
    ]


def _instances_of_series(studies: Collection[int], uids: Collection[str]) -> list[Select[Any]]:
    images = select(SERIES.c.study_row, SERIES.c.series_instance_uid, func.count())
    results = select(STUDY.c.id, RESULT.c.series_instance_uid, func.count()).join_from(STUDY, RESULT, _RESULTS)
    return [
        images.join_from(SERIES, INSTANCE, INSTANCE.c.series_row == SERIES.c.id)
        .where(SERIES.c.study_row.in_(studies), SERIES.c.series_instance_uid.in_(uids))
        .group_by(SERIES.c.study_row, SERIES.c.series_instance_uid),
        results.where(STUDY.c.id.in_(studies), RESULT.c.series_instance_uid.in_(uids), _NO_INSTANCE).group_by(
            STUDY.c.id, RESULT.c.series_instance_uid
        ),
    ]


def _added(connection: Connection, statements: Sequence[Select[Any]]) -> dict[tuple[Any, ...], int]:
    """The last column of the statements' rows, added up by all columns before it."""
    numbers: dict[tuple[Any, ...], int] = {}
    for statement in statements:
        for *key, number in connection.execute(statement):
            numbers[tuple(key)] = numbers.get(tuple(key), 0) + number
    return numbers


def _modalities(connection: Connection, studies: Sequence[int]) -> dict[int, set[str]]:
    received = select(SERIES.c.study_row, SERIES.c.modality).where(SERIES.c.study_row.in_(studies)).distinct()
    made = select(STUDY.c.id, RESULT.c.modality).join_from(STUDY, RESULT, _RESULTS).where(STUDY.c.id.in_(studies)).distinct()
    found: dict[int, set[str]] = {}
    for study, modality in connection.execute(union_all(received, made)):
        if modality:
            found.setdefault(study, set()).add(modality)
    return found
