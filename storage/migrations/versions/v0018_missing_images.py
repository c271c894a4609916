"""Images that a peer holds and that did not come: by which routes they are fetched, and what was asked; and how a peer is retrieved from.

Revision ID: 0018
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0018"
down_revision = "0015"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peer", sa.Column("retrieve_by", sa.Text(), nullable=True))
    op.add_column("route", sa.Column("fetch_missing", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.create_table(
        "missing",
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("revision", sa.Integer(), nullable=False),
        sa.Column("sent_before", sa.Boolean(), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("instances", sa.Integer(), nullable=False),
        sa.Column("arrived", sa.Integer(), nullable=False),
        sa.Column("reason", sa.Text(), nullable=True),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("study_instance_uid", "peer", name="pk_missing"),
    )
