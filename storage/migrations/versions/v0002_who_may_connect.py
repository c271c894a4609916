"""Who may connect, what was counted, and one digest of a file in place of two.

The digest that stays is that of the data set. Rows of `result` and `quarantine` keep the digest of the whole file for
objects of release 0.1.0; the version digit of their ids tells.

Revision ID: 0002
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("peer", sa.Column("networks", sa.JSON(), nullable=False, server_default="[]"))
    op.add_column("peer", sa.Column("user", sa.Text(), nullable=True))
    op.add_column("peer", sa.Column("passcode_hash", sa.Text(), nullable=True))
    op.create_table(
        "counter",
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("count", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("name", name="pk_counter"),
    )
    op.execute("ALTER TABLE instance DROP COLUMN sha256")  # both databases can: no table has to be made anew
    op.execute("ALTER TABLE instance RENAME COLUMN dataset_sha256 TO sha256")
