"""Runs the migrations on the connection that ``core.catalog.migrate`` hands over; there is no alembic.ini."""

from __future__ import annotations

from alembic import context

from core.catalog.tables import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
)
with context.begin_transaction():
    context.run_migrations()
