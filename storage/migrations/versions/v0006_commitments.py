"""Which peers commit to what they received, what they were asked, and what they answered.

Revision ID: 0006
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peer", sa.Column("commits", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("delivery", sa.Column("transaction_uid", sa.Text(), nullable=True))
    op.add_column("delivery", sa.Column("refusals", sa.Integer(), nullable=False, server_default="0"))
    op.add_column("delivery", sa.Column("committed_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table(
        "commitment",
        sa.Column("transaction_uid", sa.Text(), nullable=False),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("job_key", sa.Text(), nullable=False),
        sa.Column("state", sa.Text(), nullable=False),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("due_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("answered_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("transaction_uid", name="pk_commitment"),
        sa.ForeignKeyConstraint(["job_key"], ["job.key"], name="fk_commitment_job_key"),
    )
    op.create_index("ix_commitment_job_key", "commitment", ["job_key"])
