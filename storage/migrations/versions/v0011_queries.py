"""What queries ask for: more of each study, the series of results, names without case and accents, indices; and who may ask.

Revision ID: 0011
"""

from __future__ import annotations

import unicodedata

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0007"
branch_labels = None
depends_on = None

_PATIENT = sa.table("patient", sa.column("id", sa.BigInteger), sa.column("patient_name", sa.Text), sa.column("folded_name", sa.Text))


def upgrade() -> None:
    op.add_column("patient", sa.Column("folded_name", sa.Text(), nullable=False, server_default=""))
    for name in ("study_time", "study_id", "referring_physician", "birth_date", "sex"):
        op.add_column("study", sa.Column(name, sa.Text(), nullable=True))
    op.add_column("series", sa.Column("body_part", sa.Text(), nullable=True))
    op.add_column("result", sa.Column("series_instance_uid", sa.Text(), nullable=True))
    op.add_column("result", sa.Column("series_number", sa.BigInteger(), nullable=True))
    op.add_column("result", sa.Column("series_description", sa.Text(), nullable=True))
    op.add_column("result", sa.Column("instance_number", sa.BigInteger(), nullable=True))
    op.add_column("peer", sa.Column("queries", sa.Boolean(), nullable=False, server_default=sa.true()))
    for table, column in (
        ("study", "patient_row"),
        ("study", "study_date"),
        ("study", "accession_number"),
        ("series", "series_instance_uid"),
    ):
        op.create_index(f"ix_{table}_{column}", table, [column])
    connection = op.get_bind()
    for row in connection.execute(sa.select(_PATIENT.c.id, _PATIENT.c.patient_name)).all():
        connection.execute(sa.update(_PATIENT).where(_PATIENT.c.id == row.id).values(folded_name=_folded(row.patient_name)))


def _folded(name: str) -> str:
    """As storage/query.py folds names at this revision."""
    plain = "".join(c for c in unicodedata.normalize("NFKD", name).casefold() if not "\u0300" <= c <= "\u036f")
    groups = [group.rstrip("^ ").strip() for group in unicodedata.normalize("NFC", plain).split("=")]
    return f"={'='.join(groups)}="
