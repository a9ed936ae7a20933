"""What alembic runs for each of its commands, on the connection that `database.migrate` gives it."""

from alembic import context

context.configure(context.config.attributes["connection"])
context.run_migrations()
