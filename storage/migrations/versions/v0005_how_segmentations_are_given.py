"""How a peer is given segmentations, and which objects a route gives in place of its peers' profiles.

Revision ID: 0005
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peer", sa.Column("seg_per", sa.Text(), nullable=False, server_default="model"))
    op.add_column("peer", sa.Column("empty_frames", sa.Boolean(), nullable=False, server_default=sa.false()))
    op.add_column("route", sa.Column("objects", sa.JSON(none_as_null=True)))
    op.add_column("job", sa.Column("objects", sa.JSON(), nullable=False, server_default="{}"))
