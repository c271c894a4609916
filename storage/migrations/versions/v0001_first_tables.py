"""The first tables.

Revision ID: 0001
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

_ROW_ID = sa.BigInteger().with_variant(sa.Integer(), "sqlite")


def upgrade() -> None:
    op.create_table(
        "lease",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("owner", sa.Text(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_lease"),
    )
    op.create_table(
        "package",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("check", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("added_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_package"),
        sa.UniqueConstraint("name", "version", name="uq_package_name_version"),
    )
    op.create_table(
        "patient",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("patient_id", sa.Text(), nullable=False),
        sa.Column("patient_name", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("id", name="pk_patient"),
        sa.UniqueConstraint("patient_id", "patient_name", name="uq_patient_patient_id_patient_name"),
    )
    op.create_table(
        "peer",
        sa.Column("ae_title", sa.Text(), nullable=False),
        sa.Column("host", sa.Text(), nullable=False),
        sa.Column("port", sa.Integer(), nullable=False),
        sa.Column("sends", sa.Boolean(), nullable=False),
        sa.Column("receives", sa.Boolean(), nullable=False),
        sa.Column("tls", sa.Boolean(), nullable=False),
        sa.Column("client_cert", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("ae_title", name="pk_peer"),
    )
    op.create_table(
        "quarantine",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=True),
        sa.Column("calling_ae_title", sa.Text(), nullable=False),
        sa.Column("dimse_status", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("repeats", sa.Integer(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=True),
        sa.Column("sha256", sa.Text(), nullable=True),
        sa.Column("size", sa.BigInteger(), nullable=True),
        sa.PrimaryKeyConstraint("id", name="pk_quarantine"),
        sa.UniqueConstraint("object_id", name="uq_quarantine_object_id"),
    )
    op.create_index("ix_quarantine_sop_instance_uid", "quarantine", ["sop_instance_uid"], unique=False)
    op.create_index("ix_quarantine_study_instance_uid", "quarantine", ["study_instance_uid"], unique=False)
    op.create_table(
        "route",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("from_ae_title", sa.Text(), nullable=False),
        sa.Column("called_ae_title", sa.Text(), nullable=False),
        sa.Column("package", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("priority", sa.Text(), nullable=True),
        sa.Column("quiet_seconds", sa.Float(), nullable=False),
        sa.Column("report_refusals", sa.Boolean(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_route"),
    )
    op.create_table(
        "route_destination",
        sa.Column("route", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("ae_title", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["ae_title"], ["peer.ae_title"], name="fk_route_destination_ae_title"),
        sa.ForeignKeyConstraint(["route"], ["route.name"], name="fk_route_destination_route", ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("route", "position", name="pk_route_destination"),
    )
    op.create_table(
        "study",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("patient_row", _ROW_ID, nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("study_date", sa.Text(), nullable=False),
        sa.Column("study_description", sa.Text(), nullable=False),
        sa.Column("accession_number", sa.Text(), nullable=False),
        sa.Column("first_received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("released_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("last_image", sa.BigInteger(), nullable=False),
        sa.Column("closed_image", sa.BigInteger(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["patient_row"], ["patient.id"], name="fk_study_patient_row"),
        sa.PrimaryKeyConstraint("id", name="pk_study"),
        sa.UniqueConstraint("study_instance_uid", name="uq_study_study_instance_uid"),
    )
    op.create_index("ix_study_last_received_at", "study", ["last_received_at"], unique=False)
    op.create_table(
        "revision",
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("last_image", sa.BigInteger(), nullable=False),
        sa.Column("closed_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("evidence", sa.Text(), nullable=False),
        sa.Column("outcome", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["study_instance_uid"], ["study.study_instance_uid"], name="fk_revision_study_instance_uid"),
        sa.PrimaryKeyConstraint("study_instance_uid", "number", name="pk_revision"),
    )
    op.create_table(
        "series",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("study_row", _ROW_ID, nullable=False),
        sa.Column("series_instance_uid", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("series_number", sa.BigInteger(), nullable=True),
        sa.Column("series_description", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["study_row"], ["study.id"], name="fk_series_study_row"),
        sa.PrimaryKeyConstraint("id", name="pk_series"),
        sa.UniqueConstraint("study_row", "series_instance_uid", name="uq_series_study_row_series_instance_uid"),
    )
    op.create_table(
        "instance",
        sa.Column("id", _ROW_ID, nullable=False),
        sa.Column("study_row", _ROW_ID, nullable=False),
        sa.Column("series_row", _ROW_ID, nullable=False),
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("transfer_syntax_uid", sa.Text(), nullable=False),
        sa.Column("dataset_sha256", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("made_here", sa.Boolean(), nullable=False),
        sa.Column("instance_number", sa.BigInteger(), nullable=True),
        sa.Column("requested_priority", sa.Text(), nullable=False),
        sa.Column("calling_ae_title", sa.Text(), nullable=False),
        sa.Column("called_ae_title", sa.Text(), nullable=False),
        sa.Column("note", sa.Text(), nullable=False),
        sa.Column("received_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["series_row"], ["series.id"], name="fk_instance_series_row"),
        sa.ForeignKeyConstraint(["study_row"], ["study.id"], name="fk_instance_study_row"),
        sa.PrimaryKeyConstraint("id", name="pk_instance"),
        sa.UniqueConstraint("object_id", name="uq_instance_object_id"),
        sa.UniqueConstraint("sop_instance_uid", name="uq_instance_sop_instance_uid"),
        sqlite_autoincrement=True,
    )
    op.create_index("ix_instance_series_row", "instance", ["series_row"], unique=False)
    op.create_index("ix_instance_study_row_id", "instance", ["study_row", "id"], unique=False)
    op.create_table(
        "job",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("package", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=False),
        sa.Column("digest", sa.Text(), nullable=False),
        sa.Column("run", sa.Integer(), nullable=False),
        sa.Column("peer", sa.Text(), nullable=True),
        sa.Column("to_ae_titles", sa.JSON(), nullable=False),
        sa.Column("report_refusals", sa.Boolean(), nullable=False),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("reason_code", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("detail", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("started_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("ended_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(
            ["study_instance_uid", "revision"],
            ["revision.study_instance_uid", "revision.number"],
            name="fk_job_study_instance_uid_revision",
        ),
        sa.PrimaryKeyConstraint("key", name="pk_job"),
    )
    op.create_index("ix_job_state", "job", ["state"], unique=False)
    op.create_index("ix_job_study_instance_uid_revision_package", "job", ["study_instance_uid", "revision", "package"], unique=False)
    op.create_table(
        "result",
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("sop_class_uid", sa.Text(), nullable=False),
        sa.Column("transfer_syntax_uid", sa.Text(), nullable=False),
        sa.Column("modality", sa.Text(), nullable=False),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("job_key", sa.Text(), nullable=False),
        sa.Column("object_id", sa.Text(), nullable=False),
        sa.Column("sha256", sa.Text(), nullable=False),
        sa.Column("size", sa.BigInteger(), nullable=False),
        sa.Column("created_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_key"], ["job.key"], name="fk_result_job_key"),
        sa.PrimaryKeyConstraint("sop_instance_uid", name="pk_result"),
        sa.UniqueConstraint("object_id", name="uq_result_object_id"),
    )
    op.create_index("ix_result_job_key", "result", ["job_key"], unique=False)
    op.create_index("ix_result_study_instance_uid", "result", ["study_instance_uid"], unique=False)
    op.create_table(
        "delivery",
        sa.Column("sop_instance_uid", sa.Text(), nullable=False),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("job_key", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("attempts", sa.Integer(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("sent_at", sa.DateTime(timezone=True), nullable=True),
        sa.ForeignKeyConstraint(["job_key"], ["job.key"], name="fk_delivery_job_key"),
        sa.ForeignKeyConstraint(["sop_instance_uid"], ["result.sop_instance_uid"], name="fk_delivery_sop_instance_uid"),
        sa.PrimaryKeyConstraint("sop_instance_uid", "peer", name="pk_delivery"),
    )
    op.create_index("ix_delivery_job_key", "delivery", ["job_key"], unique=False)
