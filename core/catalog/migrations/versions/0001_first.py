"""Schema 0001, the first: artifacts, recipes, variants, runs, measurements, headlines and the job queue."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from core.catalog.immutable import freeze

revision = "0001"
down_revision = None


def upgrade() -> None:
    _create_content()
    _create_measurements()
    _create_queue()
    op.execute("INSERT INTO meta (key, value) VALUES ('revision', 0), ('jobs_revision', 0)")
    freeze(op.get_bind(), ("run", "measurement", "layer_stat"))


def _create_content() -> None:
    op.create_table(
        "meta",
        sa.Column("key", sa.Text(), nullable=False),
        sa.Column("value", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("key", name=op.f("pk_meta")),
    )
    op.create_table(
        "artifact",
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("files", sa.JSON(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_artifact")),
    )
    op.create_table(
        "recipe",
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("canonical", sa.Text(), nullable=False),
        sa.Column("method", sa.Text(), nullable=False),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_recipe")),
    )
    op.create_index(op.f("ix_recipe_method"), "recipe", ["method"], unique=False)
    op.create_table(
        "variant",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("source", sa.Text(), nullable=False),
        sa.Column("base_id", sa.Text(), nullable=False),
        sa.Column("recipe_hash", sa.Text(), nullable=True),
        sa.Column("artifact", sa.Text(), nullable=True),
        sa.Column("format", sa.Text(), nullable=False),
        sa.Column("fingerprint", sa.Text(), nullable=False),
        sa.Column("architecture", sa.Text(), nullable=False),
        sa.Column("family", sa.String(length=16), nullable=False),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("bytes", sa.BigInteger(), nullable=False),
        sa.Column("bits_per_weight", sa.Double(), nullable=False),
        sa.Column("proven", sa.Boolean(), nullable=False),
        sa.Column("hidden", sa.Boolean(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["artifact"], ["artifact.hash"], name=op.f("fk_variant_artifact_artifact")),
        sa.ForeignKeyConstraint(["base_id"], ["variant.id"], name=op.f("fk_variant_base_id_variant")),
        sa.ForeignKeyConstraint(["recipe_hash"], ["recipe.hash"], name=op.f("fk_variant_recipe_hash_recipe")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_variant")),
    )
    op.create_index(op.f("ix_variant_artifact"), "variant", ["artifact"], unique=False)
    op.create_index(
        op.f("ix_variant_base_id_variant_created_at"), "variant", ["base_id", "created_at"], unique=False
    )
    op.create_table(
        "variant_edge",
        sa.Column("child_id", sa.Text(), nullable=False),
        sa.Column("parent_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("role", sa.String(length=16), nullable=False),
        sa.ForeignKeyConstraint(["child_id"], ["variant.id"], name=op.f("fk_variant_edge_child_id_variant")),
        sa.ForeignKeyConstraint(
            ["parent_id"], ["variant.id"], name=op.f("fk_variant_edge_parent_id_variant")
        ),
        sa.PrimaryKeyConstraint("child_id", "parent_id", name=op.f("pk_variant_edge")),
    )
    op.create_index(op.f("ix_variant_edge_parent_id"), "variant_edge", ["parent_id"], unique=False)


def _create_measurements() -> None:
    op.create_table(
        "environment",
        sa.Column("hash", sa.Text(), nullable=False),
        sa.Column("facts", sa.JSON(), nullable=False),
        sa.PrimaryKeyConstraint("hash", name=op.f("pk_environment")),
    )
    op.create_table(
        "run",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("kind", sa.String(length=16), nullable=False),
        sa.Column("variant_id", sa.Text(), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("flags", sa.JSON(), nullable=False),
        sa.Column("protocol", sa.Text(), nullable=False),
        sa.Column("conditions", sa.JSON(), nullable=False),
        sa.Column("environment", sa.Text(), nullable=True),
        sa.Column("started_at", sa.DateTime(), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=True),
        sa.ForeignKeyConstraint(
            ["environment"], ["environment.hash"], name=op.f("fk_run_environment_environment")
        ),
        sa.ForeignKeyConstraint(["variant_id"], ["variant.id"], name=op.f("fk_run_variant_id_variant")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_run")),
    )
    op.create_index(op.f("ix_run_ended_at"), "run", ["ended_at"], unique=False)
    op.create_index(op.f("ix_run_variant_id_run_ended_at"), "run", ["variant_id", "ended_at"], unique=False)
    op.create_table(
        "measurement",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("better", sa.String(length=16), nullable=False),
        sa.Column("n", sa.Integer(), nullable=True),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("interval", sa.Text(), nullable=False),
        sa.Column("conditions", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_measurement_run_id_run")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_measurement")),
    )
    op.create_index(
        op.f("ix_measurement_run_id_measurement_name"), "measurement", ["run_id", "name"], unique=False
    )
    op.create_table(
        "frame",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("artifact", sa.Text(), nullable=False),
        sa.Column("rows", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["artifact"], ["artifact.hash"], name=op.f("fk_frame_artifact_artifact")),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_frame_run_id_run")),
        sa.PrimaryKeyConstraint("run_id", "name", name=op.f("pk_frame")),
    )
    op.create_index(op.f("ix_frame_artifact"), "frame", ["artifact"], unique=False)
    op.create_table(
        "layer_stat",
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.Column("position", sa.Integer(), nullable=False),
        sa.Column("module", sa.Text(), nullable=False),
        sa.Column("layer", sa.Integer(), nullable=True),
        sa.Column("component", sa.Text(), nullable=False),
        sa.Column("bits", sa.Double(), nullable=True),
        sa.Column("parameters", sa.BigInteger(), nullable=False),
        sa.Column("relative_error", sa.Double(), nullable=True),
        sa.Column("sqnr_db", sa.Double(), nullable=True),
        sa.Column("touched", sa.Boolean(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_layer_stat_run_id_run")),
        sa.PrimaryKeyConstraint("run_id", "position", name=op.f("pk_layer_stat")),
    )
    op.create_table(
        "headline",
        sa.Column("variant_id", sa.Text(), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("value", sa.Double(), nullable=False),
        sa.Column("low", sa.Double(), nullable=True),
        sa.Column("high", sa.Double(), nullable=True),
        sa.Column("unit", sa.Text(), nullable=False),
        sa.Column("better", sa.String(length=16), nullable=False),
        sa.Column("status", sa.String(length=16), nullable=False),
        sa.Column("ended_at", sa.DateTime(), nullable=False),
        sa.Column("run_id", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["run_id"], ["run.id"], name=op.f("fk_headline_run_id_run")),
        sa.ForeignKeyConstraint(["variant_id"], ["variant.id"], name=op.f("fk_headline_variant_id_variant")),
        sa.PrimaryKeyConstraint("variant_id", "name", name=op.f("pk_headline")),
        sqlite_with_rowid=False,
    )


def _create_queue() -> None:
    op.create_table(
        "job",
        sa.Column("id", sa.Text(), nullable=False),
        sa.Column("group_id", sa.Text(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("spec", sa.JSON(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("token", sa.Text(), nullable=True),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("max_attempts", sa.Integer(), nullable=False),
        sa.Column("done", sa.Double(), nullable=False),
        sa.Column("total", sa.Double(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("error", sa.Text(), nullable=False),
        sa.Column("log_path", sa.Text(), nullable=False),
        sa.Column("created_at", sa.DateTime(), nullable=False),
        sa.Column("started_at", sa.DateTime(), nullable=True),
        sa.Column("ended_at", sa.DateTime(), nullable=True),
        sa.Column("heartbeat_at", sa.DateTime(), nullable=True),
        sa.Column("host", sa.Text(), nullable=True),
        sa.Column("pid", sa.Integer(), nullable=True),
        sa.Column("pid_created", sa.Double(), nullable=True),
        sa.Column("rss_bytes", sa.BigInteger(), nullable=True),
        sa.Column("exit_code", sa.Integer(), nullable=True),
        sa.Column("cancel_requested", sa.Boolean(), nullable=False),
        sa.Column("depends_on", sa.Text(), nullable=True),
        sa.Column("blocked", sa.Boolean(), nullable=False),
        sa.Column("result", sa.JSON(), nullable=False),
        sa.ForeignKeyConstraint(["depends_on"], ["job.id"], name=op.f("fk_job_depends_on_job")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job")),
    )
    op.create_index(op.f("ix_job_created_at_job_id"), "job", ["created_at", "id"], unique=False)
    op.create_index(op.f("ix_job_depends_on"), "job", ["depends_on"], unique=False)
    op.create_index(op.f("ix_job_group_id"), "job", ["group_id"], unique=False)
    op.create_index(op.f("ix_job_state_job_created_at"), "job", ["state", "created_at"], unique=False)
    op.create_table(
        "job_event",
        sa.Column("id", sa.Integer(), nullable=False),
        sa.Column("job_id", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(), nullable=False),
        sa.Column("attempt", sa.Integer(), nullable=False),
        sa.Column("state", sa.String(length=16), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["job.id"], name=op.f("fk_job_event_job_id_job")),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_job_event")),
    )
    op.create_index(op.f("ix_job_event_job_id"), "job_event", ["job_id"], unique=False)
