"""`python -m service.migrations`: bring the database of MAESTRO_DATABASE_URL up to date."""

from service.db import Database
from service.migrations.schema import upgrade
from service.settings import load_settings

if __name__ == "__main__":
    database = Database(load_settings().database_url.get_secret_value())
    upgrade(database)
    database.close()
