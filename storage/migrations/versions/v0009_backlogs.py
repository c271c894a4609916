"""What waits for a peer that cannot be reached, and what a peer is sent in the place of what it does not accept.

Revision ID: 0009
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "backlog",
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("ticket", sa.Text(), nullable=False),
        sa.Column("since", sa.DateTime(timezone=True), nullable=False),
        sa.Column("tries", sa.Integer(), nullable=False),
        sa.Column("next_at", sa.DateTime(timezone=True), nullable=True),
        sa.Column("probe", sa.Text(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.PrimaryKeyConstraint("peer", name="pk_backlog"),
    )
    op.add_column("job", sa.Column("in_backlog", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("job", sa.Column("waiting_since", sa.DateTime(timezone=True), nullable=True))
    op.add_column("delivery", sa.Column("ways", sa.JSON(), nullable=False, server_default="[]"))
    op.add_column("delivery", sa.Column("sent_as", sa.Text(), nullable=True))
    op.add_column("delivery", sa.Column("sent_class", sa.Text(), nullable=True))
    op.add_column("delivery", sa.Column("note", sa.Text(), nullable=True))
    op.create_index("ix_job_peer_in_backlog", "job", ["peer", "in_backlog"])
