"""The tables. What they mean stands in README.md; every change here needs a migration (a test compares the two).

The engine's tables live in the same database and are none of ours: they are not named here.
"""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import (
    JSON,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    Float,
    ForeignKey,
    ForeignKeyConstraint,
    Index,
    Integer,
    MetaData,
    Table,
    Text,
    TypeDecorator,
    UniqueConstraint,
    false,
    true,
)
from sqlalchemy.engine import Dialect


class WireText(TypeDecorator[str]):
    """Text that may come from a peer: what a database cannot hold (NUL, lone surrogates) becomes U+FFFD."""

    impl = Text
    cache_ok = True

    def process_bind_param(self, value: str | None, dialect: Dialect) -> str | None:  # noqa: ARG002 (the interface's)
        """Replace what SQLite or PostgreSQL would refuse."""
        if value is None or (value.isascii() and "\0" not in value):
            return value
        return "".join("\ufffd" if c == "\0" or "\ud800" <= c <= "\udfff" else c for c in value)


class UtcTime(TypeDecorator[datetime]):
    """An aware datetime, UTC on the way out: SQLite keeps no time zone, and PostgreSQL answers in the session's."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def process_bind_param(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 (the interface's)
        """Turn into UTC; a naive time raises ValueError."""
        if value is None:
            return None
        if value.tzinfo is None:
            raise ValueError("times in the database are aware")
        return value.astimezone(UTC)

    def process_result_value(self, value: datetime | None, dialect: Dialect) -> datetime | None:  # noqa: ARG002 (the interface's)
        """Return UTC."""
        if value is None:
            return None
        return value.replace(tzinfo=UTC) if value.tzinfo is None else value.astimezone(UTC)


ROW_ID = BigInteger().with_variant(Integer, "sqlite")  # SQLite numbers rows by itself for the type INTEGER alone

METADATA = MetaData(
    naming_convention={
        "ix": "ix_%(table_name)s_%(column_0_N_name)s",
        "uq": "uq_%(table_name)s_%(column_0_N_name)s",
        "fk": "fk_%(table_name)s_%(column_0_N_name)s",
        "pk": "pk_%(table_name)s",
    }
)

PATIENT = Table(
    "patient",
    METADATA,
    Column("id", ROW_ID, primary_key=True),
    Column("patient_id", WireText, nullable=False),
    Column("patient_name", WireText, nullable=False),
    Column("folded_name", WireText, nullable=False, server_default=""),  # as queries compare it
    UniqueConstraint("patient_id", "patient_name"),  # Patient ID alone is empty or not unique too often
)

STUDY = Table(
    "study",
    METADATA,
    Column("id", ROW_ID, primary_key=True),
    Column("patient_row", ForeignKey("patient.id"), nullable=False),
    Column("study_instance_uid", WireText, nullable=False, unique=True),
    Column("study_date", WireText, nullable=False),
    Column("study_description", WireText, nullable=False),
    Column("accession_number", WireText, nullable=False),
    Column("first_received_at", UtcTime, nullable=False),
    Column("last_received_at", UtcTime, nullable=False),  # of the images that count; never the same twice in a row
    Column("released_at", UtcTime),
    Column("last_image", BigInteger, nullable=False),  # highest instance.id that counts; 0: none
    Column("closed_image", BigInteger, nullable=False),  # the same of the last closed revision
    Column("revision", Integer, nullable=False),  # number of the last revision; 0: none
    Column("study_time", WireText),  # this and what follows for queries; null: the study came before they were kept
    Column("study_id", WireText),
    Column("referring_physician", WireText),
    Column("birth_date", WireText),
    Column("sex", WireText),
    Column("holds", Boolean, nullable=False, server_default=true()),  # false: its objects were removed, and none has come since
    Column("removed_at", UtcTime),  # when they were removed last
    Column("removed_why", Text),
    Index(None, "last_received_at"),
    Index(None, "patient_row"),
    Index(None, "study_date"),
    Index(None, "accession_number"),
)

SERIES = Table(
    "series",
    METADATA,
    Column("id", ROW_ID, primary_key=True),
    Column("study_row", ForeignKey("study.id"), nullable=False),
    Column("series_instance_uid", WireText, nullable=False),
    Column("modality", WireText, nullable=False),
    Column("series_number", BigInteger),
    Column("series_description", WireText, nullable=False),
    Column("body_part", WireText),
    UniqueConstraint("study_row", "series_instance_uid"),  # a series UID used in two studies is two series here
    Index(None, "series_instance_uid"),
)

INSTANCE = Table(
    "instance",
    METADATA,
    Column("id", ROW_ID, primary_key=True),  # within a study in the order of arrival: given under the study's lock
    Column("study_row", ForeignKey("study.id"), nullable=False),
    Column("series_row", ForeignKey("series.id"), nullable=False),
    Column("sop_instance_uid", WireText, nullable=False, unique=True),
    Column("sop_class_uid", WireText, nullable=False),
    Column("transfer_syntax_uid", WireText, nullable=False),
    Column("kind", Text, nullable=False),
    Column("made_here", Boolean, nullable=False),
    Column("instance_number", BigInteger),
    Column("requested_priority", Text, nullable=False),
    Column("calling_ae_title", WireText, nullable=False),
    Column("called_ae_title", WireText, nullable=False),
    Column("note", WireText, nullable=False),
    Column("received_at", UtcTime, nullable=False),
    Column("object_id", Text, nullable=False, unique=True),
    Column("sha256", Text, nullable=False),  # of the data set, as everywhere here
    Column("size", BigInteger, nullable=False),
    Column("acquisition_number", BigInteger),
    Column("images_in_acquisition", BigInteger),
    Column("orientation", WireText),
    Column("position", Float),
    Index(None, "study_row", "id"),
    Index(None, "series_row"),
    sqlite_autoincrement=True,  # ids are never used again, so a revision's upper bound stays true
)

REVISION = Table(
    "revision",
    METADATA,
    Column("study_instance_uid", ForeignKey("study.study_instance_uid"), primary_key=True),
    Column("number", Integer, primary_key=True, autoincrement=False),
    Column("last_image", BigInteger, nullable=False),  # it holds the images that count with instance.id up to this one
    Column("closed_at", UtcTime, nullable=False),
    Column("evidence", Text, nullable=False),
    Column("outcome", Text, nullable=False),
    Column("facts", JSON, nullable=False, server_default="{}"),
    Column("series", JSON(none_as_null=True)),  # UIDs: it holds these alone, and the study stayed open; null: all that had come
)

QUARANTINE = Table(
    "quarantine",
    METADATA,
    Column("id", ROW_ID, primary_key=True),
    Column("sop_instance_uid", WireText, nullable=False),
    Column("study_instance_uid", WireText),
    Column("calling_ae_title", WireText, nullable=False),
    Column("dimse_status", Integer, nullable=False),
    Column("reason", WireText, nullable=False),
    Column("received_at", UtcTime, nullable=False),
    Column("repeats", Integer, nullable=False),
    Column("object_id", Text, unique=True),
    Column("sha256", Text),
    Column("size", BigInteger),
    Index(None, "sop_instance_uid"),
    Index(None, "study_instance_uid"),
)

PEER = Table(
    "peer",
    METADATA,
    Column("ae_title", Text, primary_key=True),
    Column("host", Text, nullable=False),
    Column("port", Integer, nullable=False),
    Column("sends", Boolean, nullable=False),
    Column("receives", Boolean, nullable=False),
    Column("tls", Boolean, nullable=False),
    Column("client_cert", Text),
    Column("networks", JSON, nullable=False, server_default="[]"),
    Column("user", Text),
    Column("passcode_hash", Text),
    Column("objects", JSON, nullable=False, server_default='["seg", "sr"]'),
    Column("commits", Boolean, nullable=False, server_default=false()),
    Column("seg_per", Text, nullable=False, server_default="model"),
    Column("empty_frames", Boolean, nullable=False, server_default=false()),
    Column("queries", Boolean, nullable=False, server_default=true()),
    Column("stow_url", Text),
    Column("stow_credentials", Text),
    Column("quirks", JSON(none_as_null=True)),  # what `peer echo --probe --save` found out
    Column("retrieve_by", Text),
)

ROUTE = Table(
    "route",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("from_ae_title", Text, nullable=False),
    Column("called_ae_title", Text, nullable=False),
    Column("package", Text, nullable=False),
    Column("version", Text),
    Column("priority", Text),
    Column("quiet_seconds", Float, nullable=False),
    Column("report_refusals", Boolean, nullable=False),
    Column("objects", JSON(none_as_null=True)),
    Column("early", Boolean, nullable=False, server_default=false()),
    Column("longest_wait_seconds", Float),
    Column("completeness_peer", Text),
    Column("priors", JSON(none_as_null=True)),
    Column("first_series_seconds", Float),
    Column("fetch_missing", Boolean, nullable=False, server_default=false()),
)

ROUTE_DESTINATION = Table(
    "route_destination",
    METADATA,
    Column("route", ForeignKey("route.name", ondelete="CASCADE"), primary_key=True),
    Column("position", Integer, primary_key=True, autoincrement=False),
    Column("ae_title", ForeignKey("peer.ae_title"), nullable=False),  # a peer that a route sends to cannot go
)

PACKAGE = Table(
    "package",
    METADATA,
    Column("id", ROW_ID, primary_key=True),
    Column("name", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("check", JSON(none_as_null=True)),
    Column("added_at", UtcTime, nullable=False),
    UniqueConstraint("name", "version"),
)

JOB = Table(
    "job",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("kind", Text, nullable=False),
    Column("study_instance_uid", Text, nullable=False),
    Column("revision", Integer, nullable=False),
    Column("package", Text, nullable=False),
    Column("version", Text, nullable=False),
    Column("digest", Text, nullable=False),
    Column("run", Integer, nullable=False),
    Column("peer", Text),
    Column("to_ae_titles", JSON, nullable=False),
    Column("report_refusals", Boolean, nullable=False),
    Column("priority", Text, nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("reason_code", Text),
    Column("reason", Text),
    Column("detail", JSON, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("started_at", UtcTime),
    Column("ended_at", UtcTime),
    Column("progress", Float),  # 0..1 while it runs
    Column("objects", JSON, nullable=False, server_default="{}"),  # AE title: what a route gives it in place of its profile
    Column("in_backlog", Boolean, nullable=False, server_default=false()),  # it has no ticket: its peer's backlog has one
    Column("waiting_since", UtcTime),
    ForeignKeyConstraint(["study_instance_uid", "revision"], ["revision.study_instance_uid", "revision.number"]),  # contract 7
    Index(None, "study_instance_uid", "revision", "package"),
    Index(None, "state"),
    Index(None, "peer", "in_backlog"),
    Index(None, "ended_at"),
)

WORKITEM = Table(
    "workitem",
    METADATA,
    Column("uid", Text, primary_key=True),
    Column("job_key", ForeignKey("job.key")),  # null: it waits for its study
    Column("study_instance_uid", WireText, nullable=False),
    Column("requester", Text),
    Column("package", Text, nullable=False),
    Column("version", Text),
    Column("priority", Text, nullable=False),  # that was asked for; a job has its own
    Column("to_ae_titles", JSON, nullable=False, server_default="[]"),
    Column("label", WireText, nullable=False),
    Column("worklist_label", WireText, nullable=False),
    Column("scheduled_at", UtcTime, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("requested", JSON, nullable=False, server_default="{}"),  # what its requester said, in the DICOM JSON Model
    Column("patient_name", WireText, nullable=False, server_default=""),  # this and what follows: the same, for searches
    Column("folded_name", WireText, nullable=False, server_default=""),
    Column("patient_id", WireText, nullable=False, server_default=""),
    Column("birth_date", WireText, nullable=False, server_default=""),
    Column("sex", WireText, nullable=False, server_default=""),
    Column("accession_number", WireText, nullable=False, server_default=""),
    Column("requested_procedure_id", WireText, nullable=False, server_default=""),
    Column("cancel", JSON(none_as_null=True)),  # the last request to cancel it
    Column("cancel_at", UtcTime),
    Column("started_at", UtcTime),  # where its job doesn't say so any more
    Column("state", Text),  # this and what follows: how it ended without its job; null: as its job did
    Column("ended_at", UtcTime),
    Column("reason_code", Text),
    Column("reason", Text),
    Index(None, "job_key"),
    Index(None, "study_instance_uid"),
    Index(None, "created_at"),
    Index(None, "ended_at"),
)

SUBSCRIPTION = Table(
    "subscription",
    METADATA,
    Column("ae_title", Text, primary_key=True),
    Column("target", Text, primary_key=True),  # a work item, or a well-known UID
    Column("keys", JSON, nullable=False, server_default="{}"),
    Column("wanted", Boolean, nullable=False, server_default=true()),
    Column("created_at", UtcTime, nullable=False),
    Column("suspended_at", UtcTime),
    Column("told_until", UtcTime),
)

BACKLOG = Table(
    "backlog",
    METADATA,
    Column("peer", Text, primary_key=True),
    Column("ticket", Text, nullable=False),  # the one on the engine's queue: an older one does nothing
    Column("since", UtcTime, nullable=False),
    Column("tries", Integer, nullable=False),  # in vain, running
    Column("next_at", UtcTime),  # when the peer is tried again; null: it is back, and the backlog is worked off
    Column("probe", Text),  # the job that may try it meanwhile
    Column("error", WireText),
)

RESULT = Table(
    "result",
    METADATA,
    Column("sop_instance_uid", Text, primary_key=True),
    Column("sop_class_uid", Text, nullable=False),
    Column("transfer_syntax_uid", Text, nullable=False),
    Column("modality", Text, nullable=False),
    Column("study_instance_uid", Text, nullable=False),
    Column("job_key", ForeignKey("job.key"), nullable=False),
    Column("object_id", Text, nullable=False, unique=True),
    Column("sha256", Text, nullable=False),
    Column("size", BigInteger, nullable=False),
    Column("created_at", UtcTime, nullable=False),
    Column("series_instance_uid", Text),  # this and what follows for queries; null: the result was made before they were kept
    Column("series_number", BigInteger),
    Column("series_description", Text),
    Column("instance_number", BigInteger),
    Column("removed_at", UtcTime),  # its object is gone; the row stays, so that it is known as made here when it comes back
    Index(None, "study_instance_uid"),
    Index(None, "job_key"),
)

REMOVAL = Table("removal", METADATA, Column("object_id", Text, primary_key=True))  # files to remove, whose rows are gone

DELIVERY = Table(
    "delivery",
    METADATA,
    Column("sop_instance_uid", ForeignKey("result.sop_instance_uid"), primary_key=True),
    Column("peer", Text, primary_key=True),
    Column("job_key", ForeignKey("job.key"), nullable=False),
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("status", Integer),
    Column("error", WireText),
    Column("next_at", UtcTime),
    Column("sent_at", UtcTime),
    Column("transaction_uid", Text),  # under which the peer was last asked to commit to it
    Column("refusals", Integer, nullable=False, server_default="0"),  # how often it answered that it doesn't hold it
    Column("committed_at", UtcTime),
    Column("ways", JSON, nullable=False, server_default="[]"),  # [[SOP Instance UID, [those it refers to]], …]: itself, alternatives
    Column("sent_as", Text),  # what the peer has in its place, by its SOP Instance UID; null: itself
    Column("sent_class", Text),  # and its SOP Class UID
    Column("note", WireText),  # what the peer was sent in its place or remarked, and why
    Index(None, "job_key"),
)

COMMITMENT = Table(
    "commitment",
    METADATA,
    Column("transaction_uid", Text, primary_key=True),
    Column("peer", Text, nullable=False),
    Column("job_key", ForeignKey("job.key"), nullable=False),
    Column("state", Text, nullable=False),
    Column("asked_at", UtcTime, nullable=False),
    Column("due_at", UtcTime),  # when it counts as unanswered
    Column("answered_at", UtcTime),
    Column("error", WireText),
    Index(None, "job_key"),
)

COMMITMENT_REQUEST = Table(
    "commitment_request",
    METADATA,
    Column("key", Text, primary_key=True),
    Column("peer", Text, nullable=False),
    Column("transaction_uid", Text, nullable=False),
    Column("digest", Text, nullable=False),  # of the references, which a reported one no longer has
    Column("instances", Integer, nullable=False),
    Column("references", JSON, nullable=False),
    Column("failures", JSON(none_as_null=True)),  # null: not looked at yet
    Column("state", Text, nullable=False),
    Column("attempts", Integer, nullable=False),
    Column("reason", WireText),
    Column("asked_at", UtcTime, nullable=False),
    Column("ended_at", UtcTime),
    Index(None, "peer", "transaction_uid"),
)

NOTICE = Table(
    "notice",
    METADATA,
    Column("sop_instance_uid", WireText, primary_key=True),
    Column("study_instance_uid", WireText, primary_key=True),  # a step may be of several
    Column("kind", Text, nullable=False),
    Column("ae_title", WireText, nullable=False),
    Column("state", Text, nullable=False),
    Column("images", JSON, nullable=False),  # {Series Instance UID: [SOP Instance UID, …]}
    Column("created_at", UtcTime, nullable=False),
    Column("changed_at", UtcTime, nullable=False),
    Index(None, "study_instance_uid"),
    Index(None, "changed_at"),
)

FETCHED = Table(
    "fetched",
    METADATA,
    Column("study_instance_uid", WireText, primary_key=True),
    Column("peer", Text, nullable=False),
    Column("for_study", Text, nullable=False),
    Column("asked_at", UtcTime, nullable=False),
)

MISSING = Table(
    "missing",
    METADATA,
    Column("study_instance_uid", WireText, primary_key=True),
    Column("peer", Text, primary_key=True),
    Column("revision", Integer, nullable=False),  # that the images are for
    Column("sent_before", Boolean, nullable=False),  # whether images had come from the peer before it was asked
    Column("tries", Integer, nullable=False),
    Column("instances", Integer, nullable=False),  # that the last try asked for
    Column("arrived", Integer, nullable=False),  # after all tries
    Column("reason", WireText),  # why the last try didn't bring all
    Column("asked_at", UtcTime, nullable=False),
)

LEASE = Table(
    "lease",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("owner", Text, nullable=False),
    Column("expires_at", UtcTime, nullable=False),
)

COUNTER = Table(
    "counter",
    METADATA,
    Column("name", Text, primary_key=True),
    Column("count", BigInteger, nullable=False),
)
