"""How Alembic reaches the database: the connection `app.migrate` hands over, else `LUTHIER_DATABASE_URL`."""

from alembic import context

from app.db import get_engine
from app.tables import Base


def run(connection) -> None:
    context.configure(connection=connection, target_metadata=Base.metadata, compare_type=True, compare_server_default=True)
    with context.begin_transaction():
        context.run_migrations()


connection = context.config.attributes.get("connection")
if connection is not None:
    run(connection)
else:
    with get_engine().begin() as connection:
        run(connection)
