"""`python -m tests.stand_in`: a stand-in of a Ray cluster's Jobs API in one process, for a thousand jobs at once."""

import argparse
import asyncio
import logging
import os
import signal

from tests.stand_in.api import Api
from tests.stand_in.cluster import Cluster
from tests.stand_in.wire import listen

TOKEN_VARIABLE = "STAND_IN_TOKEN"


async def serve(*, port: int, token: str, num_cpus: int, report_seconds: float, seed: int) -> None:
    """Until SIGTERM."""
    ended = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ended.set)
    cluster = Cluster(num_cpus=num_cpus, report_seconds=report_seconds, seed=seed)
    async with await listen(Api(cluster, token=token, seed=seed), port=port):
        await ended.wait()
        cluster.forget()


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.stand_in", description=__doc__)
    parser.add_argument("--port", type=int, required=True)
    parser.add_argument("--cpus", type=int, default=64)
    parser.add_argument("--report-seconds", type=float, default=1.0, help="the least time between two reports of a run")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    logging.basicConfig(level=logging.WARNING)
    settings = {"port": given.port, "num_cpus": given.cpus, "report_seconds": given.report_seconds, "seed": given.seed}
    asyncio.run(serve(token=os.environ[TOKEN_VARIABLE], **settings))


if __name__ == "__main__":
    main()
