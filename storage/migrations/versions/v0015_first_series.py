"""Packages that start on the first complete series of a study: by which routes, and which series a revision holds.

Revision ID: 0015
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("revision", sa.Column("series", sa.JSON(none_as_null=True), nullable=True))
    op.add_column("route", sa.Column("first_series_seconds", sa.Float(), nullable=True))
