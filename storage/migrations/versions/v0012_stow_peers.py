"""Peers that are sent results by STOW-RS: the address of their DICOMweb, and the file of what they are shown.

Revision ID: 0012
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peer", sa.Column("stow_url", sa.Text(), nullable=True))
    op.add_column("peer", sa.Column("stow_credentials", sa.Text(), nullable=True))
