"""How Alembic runs the migrations: in the transaction it is handed, never offline and never with a URL of its own."""

from __future__ import annotations

from alembic import context

context.configure(connection=context.config.attributes["connection"], transactional_ddl=True)
with context.begin_transaction():
    context.run_migrations()
