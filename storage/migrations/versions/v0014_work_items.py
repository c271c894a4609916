"""Work items of the worklist: what routes and peers ask for, and who is told of it.

Revision ID: 0014
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    time = sa.DateTime(timezone=True)
    said = [
        sa.Column(name, sa.Text(), nullable=False, server_default="")
        for name in ("patient_name", "folded_name", "patient_id", "birth_date", "sex", "accession_number", "requested_procedure_id")
    ]
    op.create_table(
        "workitem",
        sa.Column("uid", sa.Text(), nullable=False),
        sa.Column("job_key", sa.Text(), nullable=True),
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("requester", sa.Text(), nullable=True),
        sa.Column("package", sa.Text(), nullable=False),
        sa.Column("version", sa.Text(), nullable=True),
        sa.Column("priority", sa.Text(), nullable=False),
        sa.Column("to_ae_titles", sa.JSON(), nullable=False, server_default="[]"),
        sa.Column("label", sa.Text(), nullable=False),
        sa.Column("worklist_label", sa.Text(), nullable=False),
        sa.Column("scheduled_at", time, nullable=False),
        sa.Column("created_at", time, nullable=False),
        sa.Column("requested", sa.JSON(), nullable=False, server_default="{}"),
        *said,
        sa.Column("cancel", sa.JSON(none_as_null=True), nullable=True),
        sa.Column("cancel_at", time, nullable=True),
        sa.Column("started_at", time, nullable=True),
        sa.Column("state", sa.Text(), nullable=True),
        sa.Column("ended_at", time, nullable=True),
        sa.Column("reason_code", sa.Text(), nullable=True),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("uid", name="pk_workitem"),
        sa.ForeignKeyConstraint(["job_key"], ["job.key"], name="fk_workitem_job_key"),
    )
    for column in ("job_key", "study_instance_uid", "created_at", "ended_at"):
        op.create_index(f"ix_workitem_{column}", "workitem", [column])
    op.create_index("ix_job_ended_at", "job", ["ended_at"])
    op.create_table(
        "subscription",
        sa.Column("ae_title", sa.Text(), nullable=False),
        sa.Column("target", sa.Text(), nullable=False),
        sa.Column("keys", sa.JSON(), nullable=False, server_default="{}"),
        sa.Column("wanted", sa.Boolean(), nullable=False, server_default=sa.true()),
        sa.Column("created_at", time, nullable=False),
        sa.Column("suspended_at", time, nullable=True),
        sa.Column("told_until", time, nullable=True),
        sa.PrimaryKeyConstraint("ae_title", "target", name="pk_subscription"),
    )
