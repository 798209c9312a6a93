"""The log of our processes: to stderr, one line a fact."""

import logging


def configure_logging() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    for name in ("httpx", "httpcore", "botocore", "alembic"):  # they tell of every request
        logging.getLogger(name).setLevel(logging.WARNING)
