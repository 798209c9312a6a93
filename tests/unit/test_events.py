import asyncio
import json
import math
from collections.abc import AsyncIterator
from typing import Any

from fastapi.testclient import TestClient

from service import events, reports, streams
from service.db import utc_now
from service.feed import Feed
from service.ray_jobs import RayStatus
from tests.unit.service_fixtures import Service
from workers.contract import EventType, Report, RunProgress

Message = dict[str, Any]


def parse(text: str) -> list[Message]:
    messages = []
    for block in text.split("\n\n"):
        fields = dict(line.split(": ", 1) for line in block.splitlines() if not line.startswith(":"))
        if fields:
            messages.append(fields | {"data": json.loads(fields["data"])})
    return messages


def finish(service: Service, job_id: str) -> None:
    service.commit_result(job_id)
    service.ray.end(f"{job_id}-a1", RayStatus.SUCCEEDED)
    service.tick(2)


def progress(service: Service, job_id: str, *, sequence: int, **values: Any) -> None:
    report = Report(
        incarnation=1, sequence=sequence, progress=RunProgress.model_validate({"step": 1, "num_steps": 9, "epoch": 0.1} | values)
    )
    reports.record(service.database, job_id, 1, report, bucket="maestro")


def test_pages_of_events(client: TestClient, service: Service) -> None:
    job_id = service.start()
    service.submit()  # another job's events are not ours
    first = client.get(f"/v1/jobs/{job_id}/events", params={"limit": 2}).json()
    rest = client.get(f"/v1/jobs/{job_id}/events", params={"after": first["next_after"]}).json()
    assert [event["type"] for event in first["events"] + rest["events"]] == [
        "job_queued",
        "status_changed",
        "attempt_created",
        "workers_started",
        "status_changed",
    ]
    assert [event["attempt"] for event in rest["events"]] == [1, 1, 1]
    nothing = client.get(f"/v1/jobs/{job_id}/events", params={"after": rest["next_after"]}).json()
    assert nothing == {"events": [], "next_after": rest["next_after"]}


def test_the_stream_of_a_finished_job(client: TestClient, service: Service) -> None:
    job_id = service.start()
    progress(service, job_id, sequence=1, loss=math.nan)
    finish(service, job_id)
    answer = client.get(f"/v1/jobs/{job_id}/events", headers={"Accept": "text/event-stream"})
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-cache"
    messages = parse(answer.text)
    told = client.get(f"/v1/jobs/{job_id}/events").json()["events"]
    assert [message["data"] for message in messages if message["event"] == "event"] == told
    assert [int(message["id"]) for message in messages if "id" in message] == [event["id"] for event in told]
    [one] = [message for message in messages if message["event"] == "progress"]
    assert one["data"]["loss"] == "NaN"
    assert "id" not in one
    assert messages[-1]["event"] == "end"
    assert messages[-1]["data"] == {"status": "succeeded"}


def test_the_stream_goes_on_after_the_last_event_seen(client: TestClient, service: Service) -> None:
    job_id = service.start()
    finish(service, job_id)
    ids = [event.id for event in service.events(job_id)]
    headers = {"Accept": "text/event-stream", "Last-Event-ID": str(ids[2])}
    messages = parse(client.get(f"/v1/jobs/{job_id}/events", headers=headers).text)
    assert [int(message["id"]) for message in messages if "id" in message] == ids[3:]
    assert messages[-1]["event"] == "end"


def test_many_events_come_in_pages_without_a_pause(service: Service) -> None:
    job_id = service.start()
    with service.database.write() as session:
        for number in range(450):
            events.append(session, job_id, EventType.EVALUATED, {"n": number}, at=utc_now())
    service.cancel(job_id)
    with service.database.read() as session:
        expected = len(events.list_after(session, job_id, after=0, limit=10_000))
    finish_cancelled(service, job_id)
    messages = asyncio.run(collect(streams.of_job(Feed(service.database), job_id, after=0, authorize=bool)))
    assert len([message for message in messages if message["event"] == "event"]) >= expected + 2
    assert messages[-1]["data"] == {"status": "cancelled"}


def finish_cancelled(service: Service, job_id: str) -> None:
    service.tick()
    service.ray.end(f"{job_id}-a1", RayStatus.STOPPED)
    service.tick(2)


async def collect(stream: AsyncIterator[bytes]) -> list[Message]:
    return parse("".join([chunk.decode() async for chunk in stream]))


def test_nan_in_an_event_is_told_as_a_string(service: Service, client: TestClient) -> None:
    job_id = service.submit()
    with service.database.write() as session:
        events.append(session, job_id, EventType.EVALUATED, {"a": math.nan, "b": [math.inf, {"c": -math.inf}], "d": 1.5}, at=utc_now())
    told = client.get(f"/v1/jobs/{job_id}/events").json()["events"][-1]
    assert told["data"] == {"a": "NaN", "b": ["Infinity", {"c": "-Infinity"}], "d": 1.5}
