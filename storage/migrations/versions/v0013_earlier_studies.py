"""Earlier studies that are fetched from a peer: by which routes, and which they are; and what probing found out about a peer.

Revision ID: 0013
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("route", sa.Column("priors", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("peer", sa.Column("quirks", sa.JSON(none_as_null=True), nullable=True))
    op.create_table(
        "fetched",
        sa.Column("study_instance_uid", sa.Text(), nullable=False),
        sa.Column("peer", sa.Text(), nullable=False),
        sa.Column("for_study", sa.Text(), nullable=False),
        sa.Column("asked_at", sa.DateTime(timezone=True), nullable=False),
        sa.PrimaryKeyConstraint("study_instance_uid", name="pk_fetched"),
    )
