"""Training states that go: those that the policy does not keep, what killed saves left, and nothing else, whoever dies on the way."""

from typing import Any

import pytest
from fastapi.testclient import TestClient

from service import pruning, reports
from service.counters import Count, Tally
from service.db import utc_now
from service.housekeeping import Housekeeper
from service.pruning import Pruner
from service.ray_jobs import RayStatus
from service.storage import PAGE
from tests.unit.service_fixtures import PRETRAIN, Service
from tests.unit.test_deletion import Calls, Killed
from workers.contract import EventType, Points, Report
from workers.state_names import state_name, state_prefix

EMBED = {"kind": "embed", "name": "features", "data": PRETRAIN["data"], "encoder": {"init": "random"}, "model": PRETRAIN["model"]}
FILES = ("state-00000.safetensors", "state-00001.safetensors", "manifest.json")


def prefix_of(job_id: str, step: int, *, attempt: int = 1, incarnation: int = 10) -> str:
    return state_prefix(f"jobs/{job_id}/", state_name(step=step, attempt=attempt, incarnation=incarnation))


def put(service: Service, prefix: str, *names: str) -> None:
    for name in names or FILES:
        service.storage.put_bytes(prefix + name, b"123")


def save(service: Service, job_id: str, step: int, **start: int) -> None:
    """As workers do: files, the manifest, and the word of it."""
    put(service, prefix := prefix_of(job_id, step, **start))
    number = 1000 + step * 10 + start.get("incarnation", 10)
    service.report(
        job_id, EventType.TRAINING_STATE_COMMITTED, sequence=number, key=prefix, step=step, bytes=6, attempt=start.get("attempt", 1)
    )


def sweep(service: Service, tally: Tally | None = None) -> None:
    """As a dispatcher that has just started would. Changes are noted by the real clock."""
    service.now = max(service.now, utc_now())
    Pruner(service.database, service.storage, tally=tally or Tally(), clock=lambda: service.now).sweep_when_due()
    service.pass_time(pruning.SWEEP_SECONDS)


def stored(service: Service, job_id: str) -> dict[str, list[str]]:
    """The files in storage by state, as `<step>-<attempt>-<incarnation>`."""
    found: dict[str, list[str]] = {}
    for item in service.storage.list(f"jobs/{job_id}/training_state/"):
        folder, name = item.key.split("/")[3:]
        step, attempt, incarnation = folder.removeprefix("step=").split("-")
        found.setdefault(f"{int(step)}-{attempt[1:]}-{incarnation}", []).append(name)
    return found


def listed(client: TestClient, job_id: str, **params: Any) -> dict[int, list[str]]:
    """By step, what keeps it."""
    answer = client.get(f"/v1/jobs/{job_id}/checkpoints", params=params)
    assert answer.status_code == 200, answer.text
    return {state["step"]: state["kept_because"] for state in answer.json()["checkpoints"]}


def end(service: Service, job_id: str) -> None:
    service.report(job_id, EventType.RUN_FAILED, sequence=90_000, reason="diverged")
    service.ray.end(f"{job_id}-a1", RayStatus.FAILED)
    service.tick(2)


def patch(client: TestClient, job_id: str, **keep: Any) -> int:
    return client.patch(f"/v1/jobs/{job_id}", json={"keep": keep}, headers={"If-Match": "*"}).status_code


def test_the_newest_stay_and_the_others_go_with_all_their_files(client: TestClient, service: Service) -> None:
    job_id, other, tally = service.start(), service.start(), Tally()
    for step in (200, 400, 600, 800):
        save(service, job_id, step)
        save(service, other, step)
    other_before = stored(service, other)
    with service.database.write() as session:
        session.get_one(pruning.JobRow, other).prune_at = None
    sweep(service, tally)
    assert stored(service, job_id) == {"600-1-10": sorted(FILES), "800-1-10": sorted(FILES)}
    assert listed(client, job_id) == {800: ["last"], 600: ["last"]}
    assert stored(service, other) == other_before
    assert tally._counts[Count.BYTES_FREED] == 2 * 2 * 3  # the manifests, which went before, are not counted
    assert service.row(job_id).prune_at is None
    path = f"/v1/jobs/{job_id}/artifacts/{prefix_of(job_id, 200).removeprefix(f'jobs/{job_id}/')}"
    assert client.get(path, follow_redirects=False).status_code == 404


@pytest.mark.parametrize("num_objects", [3, 2 * PAGE + 5])
def test_who_dies_at_any_step_is_followed_by_another(service: Service, num_objects: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Storage fails at each of its calls in turn: in the end what was to go is gone, and nothing else is."""
    job_id = service.start()
    for step in (200, 400):
        save(service, job_id, step)
    save(service, job_id, 600, incarnation=20)
    put(service, prefix_of(job_id, 200), *(f"{number:06d}" for number in range(num_objects)))
    put(service, prefix_of(job_id, 300, incarnation=9), FILES[0])
    service.storage.put_bytes(f"jobs/{job_id}/encoder/model.safetensors", b"x")
    num_deaths = num_sweeps = 0
    while set(stored(service, job_id)) != {"400-1-10", "600-1-20"}:
        with monkeypatch.context() as context:
            calls = Calls(dies_at=num_deaths + 1)
            for name in ("delete", "list"):
                context.setattr(service.storage, name, calls.counted(getattr(service.storage, name)))
            try:
                sweep(service)
            except Killed:
                num_deaths += 1
        assert all("manifest.json" not in files or len(files) >= 3 for files in stored(service, job_id).values()), "the manifest goes first"
        assert (num_sweeps := num_sweeps + 1) < 100
    assert num_deaths > 3
    sweep(service)
    with service.database.read() as session:
        assert {name for name, gone in pruning._known(session, job_id).items() if gone is None} == set(pruning._known(session, job_id))
    assert service.storage.list(f"jobs/{job_id}/encoder/")


def test_storage_that_is_away_is_waited_for(client: TestClient, service: Service) -> None:
    job_id = service.start()
    for step in (200, 400, 600):
        save(service, job_id, step)
    service.storage.is_down = True
    sweep(service)
    service.storage.is_down = False
    assert len(stored(service, job_id)) == 3
    assert set(listed(client, job_id)) == {600, 400}, "decided, and gone for everybody"
    sweep(service)
    assert set(stored(service, job_id)) == {"400-1-10", "600-1-10"}


def test_what_a_killed_start_left_goes_when_the_next_one_has_saved(service: Service) -> None:
    """Also a state that was committed and that nobody could tell of any more: it is listed, and kept as all others are."""
    job_id = service.start()
    save(service, job_id, 200)
    sweep(service)
    put(service, prefix_of(job_id, 400))
    put(service, prefix_of(job_id, 600), FILES[0])
    put(service, prefix_of(job_id, 700, incarnation=20), FILES[0])  # is being uploaded
    save(service, job_id, 500, incarnation=20)
    sweep(service)
    assert set(stored(service, job_id)) == {"400-1-10", "500-1-20", "700-1-20"}
    save(service, job_id, 700, incarnation=20)
    sweep(service)
    assert set(stored(service, job_id)) == {"500-1-20", "700-1-20"}


def test_a_job_that_has_ended_leaves_no_half_of_a_state(client: TestClient, service: Service) -> None:
    job_id = service.start()
    for step in (200, 400, 600):
        save(service, job_id, step)
    put(service, prefix_of(job_id, 800), FILES[0])
    end(service, job_id)
    sweep(service)
    assert set(stored(service, job_id)) == {"400-1-10", "600-1-10"}
    assert patch(client, job_id, last=1) == 200, "also of one that has ended"
    assert listed(client, job_id) == {600: ["last"], 400: []}
    sweep(service)
    assert set(stored(service, job_id)) == {"600-1-10"}


def test_what_is_pinned_stays_until_it_is_not(client: TestClient, service: Service) -> None:
    job_id = service.start()
    save(service, job_id, 200)
    name = prefix_of(job_id, 200).removeprefix(f"jobs/{job_id}/").rstrip("/")
    pinned = client.put(f"/v1/jobs/{job_id}/artifacts/{name}/pin")
    assert (pinned.status_code, pinned.json()["pinned"], pinned.json()["step"]) == (200, True, 200)
    for step in (400, 600, 800):
        save(service, job_id, step)
    sweep(service)
    assert listed(client, job_id) == {800: ["last"], 600: ["last"], 200: ["pinned"]}
    assert client.delete(f"/v1/jobs/{job_id}/artifacts/{name}/pin").json()["pinned"] is False
    sweep(service)
    assert set(stored(service, job_id)) == {"600-1-10", "800-1-10"}
    assert client.put(f"/v1/jobs/{job_id}/artifacts/{name}/pin").status_code == 404


def tell(service: Service, job_id: str, name: str, values: dict[int, float]) -> None:
    points = Points(steps=list(values), series={name: list(values.values())})
    report = Report(incarnation=10, sequence=500 + max(values), points=points)
    reports.record(service.database, job_id, 1, report, bucket=service.storage.bucket)


def test_the_best_by_a_series_and_every_so_many_steps(client: TestClient, service: Service) -> None:
    evaluation = {"labelled": {"source": "digits", "validation_fraction": 0.2}}
    policy = {"last": 1, "every_steps": 1000, "best": {"metric": "knn_accuracy", "mode": "max", "number": 1}}
    job_id = service.start(evaluation=evaluation, checkpoint={"every_steps": 200, "keep": policy})
    assert client.get(f"/v1/jobs/{job_id}").json()["keep"] == policy
    tell(service, job_id, "knn_accuracy", {300: 0.5, 700: 0.9, 1100: 0.6, 1300: float("nan")})
    for step in (200, 400, 600, 800, 1000, 1200, 1400):
        save(service, job_id, step)
    values = {state["step"]: state["value"] for state in client.get(f"/v1/jobs/{job_id}/checkpoints").json()["checkpoints"]}
    assert values == {200: None, 400: 0.5, 600: 0.5, 800: 0.9, 1000: 0.9, 1200: 0.6, 1400: "NaN"}
    assert {step: why for step, why in listed(client, job_id).items() if why} == {1400: ["last"], 1000: ["every"], 800: ["best"]}
    sweep(service)
    assert set(stored(service, job_id)) == {"800-1-10", "1000-1-10", "1400-1-10"}


def test_another_policy_is_tried_and_nothing_is_deleted(client: TestClient, service: Service) -> None:
    job_id = service.start(checkpoint={"keep": {"last": 10}})
    tell(service, job_id, "loss", {200: 3.0, 400: 1.0, 600: 2.0, 800: 2.5})
    for step in (200, 400, 600, 800):
        save(service, job_id, step)
    answer = client.get(f"/v1/jobs/{job_id}/checkpoints", params={"last": 1, "best_metric": "loss", "best_mode": "min"}).json()
    assert (answer["num_deleted"], answer["bytes_deleted"]) == (2, 12)
    assert answer["keep"] == {"last": 1, "every_steps": None, "best": {"metric": "loss", "mode": "min", "number": 1}}
    assert {state["step"]: state["kept_because"] for state in answer["checkpoints"]} == {800: ["last"], 600: [], 400: ["best"], 200: []}
    sweep(service)
    assert len(stored(service, job_id)) == 4
    first = client.get(f"/v1/jobs/{job_id}/checkpoints", params={"limit": 3}).json()
    second = client.get(f"/v1/jobs/{job_id}/checkpoints", params={"limit": 3, "cursor": first["next_cursor"]}).json()
    assert [[state["step"] for state in page["checkpoints"]] for page in (first, second)] == [[800, 600, 400], [200]]
    assert second["next_cursor"] is None
    state = first["checkpoints"][0]
    assert (state["attempt"], state["bytes"], state["pinned"], state["uri"]) == (1, 6, False, f"s3://maestro/{prefix_of(job_id, 800)}")


@pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
def test_a_policy_that_cannot_be(client: TestClient, service: Service) -> None:
    job_id, embedding = service.start(), service.submit(EMBED)
    path = f"/v1/jobs/{job_id}/checkpoints"
    for params, field in (
        *(({"last": 0}, "last"), ({"best_metric": "knn_accuracy", "best_mode": "max"}, "keep.best.metric"), ({"cursor": "x"}, "cursor")),
        *(({"best_metric": "loss"}, "best_mode"), ({"best_number": 2}, "best_metric"), ({"every_steps": 2**64}, "every_steps")),
    ):
        answer = client.get(path, params=params)
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field), (params, answer.text)
    for job, keep, field in (
        (job_id, {"best": {"metric": "val_accuracy", "mode": "max"}}, "keep.best.metric"),
        *((job_id, keep, "keep." + next(iter(keep))) for keep in ({"last": 0}, {"every_steps": 0}, {"lasts": 1})),
        *((job_id, keep, "keep") for keep in (None, 3)),
        (embedding, {"last": 1}, "keep"),
    ):
        answer = client.patch(f"/v1/jobs/{job}", json={"keep": keep}, headers={"If-Match": "*"})
        assert (answer.status_code, answer.json()["errors"][0]["field"]) == (422, field), (keep, answer.text)
    assert client.get(f"/v1/jobs/{embedding}").json()["keep"] is None
    assert client.get(f"/v1/jobs/{embedding}/checkpoints").json()["checkpoints"] == []


def test_a_changed_policy_is_told_and_goes_into_a_retry(client: TestClient, service: Service) -> None:
    job_id = service.start()
    tag = client.get(f"/v1/jobs/{job_id}").headers["etag"]
    keep = {"last": 5, "every_steps": None, "best": None}
    assert patch(client, job_id, last=5) == 200
    assert client.patch(f"/v1/jobs/{job_id}", json={"name": "x"}, headers={"If-Match": tag}).status_code == 412
    assert service.events(job_id)[-1].data["changes"] == {"keep": {"from": {"last": 2, "every_steps": None, "best": None}, "to": keep}}
    end(service, job_id)
    again = client.post(f"/v1/jobs/{job_id}/retry").json()
    assert (again["keep"], again["spec"]["checkpoint"]["keep"]) == (keep, keep)
    assert service.job(job_id).spec["checkpoint"]["keep"]["last"] == 2, "a spec is never changed"


def test_reconstructions_by_step(client: TestClient, service: Service) -> None:
    job_id = service.start()
    for number, step in enumerate((400, 200, 600)):
        told = {kind: {"key": f"jobs/{job_id}/reconstructions/step={step:010d}.{kind}", "bytes": step} for kind in ("png", "npz")}
        service.report(job_id, EventType.RECONSTRUCTIONS_WRITTEN, sequence=1 + number, step=step, **told["png"], arrays=told["npz"])
    service.report(job_id, EventType.RECONSTRUCTIONS_WRITTEN, sequence=9, step=700, key=f"jobs/{job_id}/reconstructions/x.png", bytes=1)
    first = client.get(f"/v1/jobs/{job_id}/reconstructions", params={"limit": 2}).json()
    assert [(one["step"], one["picture"]["name"], one["arrays"]["bytes"]) for one in first["reconstructions"]] == [
        (step, f"reconstructions/step={step:010d}.png", step) for step in (200, 400)
    ]
    second = client.get(f"/v1/jobs/{job_id}/reconstructions", params={"after": first["next_after"]}).json()
    assert [(one["step"], one["arrays"] is None) for one in second["reconstructions"]] == [(600, False), (700, True)]
    assert second["next_after"] is None


def test_a_log_is_not_pinned(client: TestClient, service: Service) -> None:
    job_id = service.start()
    with service.database.write() as session:
        pruning.artifacts.add(
            session, job_id, key=f"jobs/{job_id}/logs/attempt-1/", kind="log", attempt=1, num_bytes=1, bucket="maestro", at=service.now
        )
    assert client.put(f"/v1/jobs/{job_id}/artifacts/logs/attempt-1/pin").status_code == 409


def test_a_job_that_cannot_be_looked_at_keeps_no_other_from_it(service: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = service.start(), service.start()
    for step in (200, 400, 600):
        save(service, first, step)
        save(service, second, step)
    real = pruning.checkpoints.tombstone

    def fails_for_one(session: Any, job: Any, **options: Any) -> int:
        if job.id == first:
            raise ValueError("broken")
        return real(session, job, **options)

    monkeypatch.setattr(pruning.checkpoints, "tombstone", fails_for_one)
    sweep(service)
    assert (len(stored(service, first)), len(stored(service, second))) == (3, 2)
    monkeypatch.undo()
    sweep(service)
    assert len(stored(service, first)) == 3, "not at once"
    service.pass_time(pruning.ERROR_SECONDS)
    sweep(service)
    assert len(stored(service, first)) == 2


@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_job_that_another_dispatcher_holds_is_left_to_it(service: Service) -> None:
    job_id = service.start()
    for step in (200, 400, 600):
        save(service, job_id, step)
    with service.database.write() as session:
        session.get_one(pruning.JobRow, job_id, with_for_update=True)
        sweep(service)
        assert len(stored(service, job_id)) == 3
    sweep(service)
    assert len(stored(service, job_id)) == 2


def test_the_housekeeper_prunes(service: Service) -> None:
    job_id = service.start()
    for step in (200, 400, 600):
        save(service, job_id, step)
    service.now = max(service.now, utc_now())
    Housekeeper(service.database, service.storage, tally=Tally(), clock=lambda: service.now).sweep()
    assert len(stored(service, job_id)) == 2
