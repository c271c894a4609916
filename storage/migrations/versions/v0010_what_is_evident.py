"""Where an image lies in its series and acquisition, what was evident when a revision was closed, and what routes make of that.

Revision ID: 0010
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("instance", sa.Column("acquisition_number", sa.BigInteger(), nullable=True))
    op.add_column("instance", sa.Column("images_in_acquisition", sa.BigInteger(), nullable=True))
    op.add_column("instance", sa.Column("orientation", sa.Text(), nullable=True))
    op.add_column("instance", sa.Column("position", sa.Float(), nullable=True))
    op.add_column("revision", sa.Column("facts", sa.JSON(), nullable=False, server_default="{}"))
    op.add_column("route", sa.Column("early", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("route", sa.Column("longest_wait_seconds", sa.Float(), nullable=True))
    op.add_column("route", sa.Column("completeness_peer", sa.Text(), nullable=True))
