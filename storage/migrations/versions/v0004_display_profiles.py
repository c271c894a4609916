"""Which result objects a peer is given.

Revision ID: 0004
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peer", sa.Column("objects", sa.JSON(), nullable=False, server_default='["seg", "sr"]'))
