"""Schema 0002: a running job can be asked to pause."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"


def upgrade() -> None:
    asked: sa.Column[bool] = sa.Column(
        "pause_requested", sa.Boolean(), nullable=False, server_default=sa.false()
    )
    op.add_column("job", asked)
