"""What was removed by the rules of retention: studies and results without objects, and files that are still to go.

Revision ID: 0008
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("study", sa.Column("holds", sa.Boolean(), nullable=False, server_default=sa.true()))
    op.add_column("study", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("study", sa.Column("removed_why", sa.Text(), nullable=True))
    op.add_column("result", sa.Column("removed_at", sa.DateTime(timezone=True), nullable=True))
    op.create_table("removal", sa.Column("object_id", sa.Text(), nullable=False), sa.PrimaryKeyConstraint("object_id", name="pk_removal"))
