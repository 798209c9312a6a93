"""`python -m service.migrations`: bring the database of MAESTRO_DATABASE_URL up to date."""

from service.migrations.schema import upgrade
from service.settings import load_settings
from service.startup import open_database

if __name__ == "__main__":
    database = open_database(load_settings(), is_migration=True)
    upgrade(database)
    database.close()
