"""Alembic runs this: migrations within the transaction of the connection that `migrate` was given."""

from alembic import context

from vouch.service.storage.models import Base

context.configure(
    connection=context.config.attributes["connection"],
    target_metadata=Base.metadata,
    render_as_batch=True,
    transactional_ddl=False,  # the caller's transaction is the transaction
)
context.run_migrations()
