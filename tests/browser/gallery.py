"""The jobs that screenshots show: a team's month, with every status, a failure, a reference, and a family of jobs."""

from tests.browser.scenes import FINETUNE, PRETRAIN, PROBE, Scenes
from workers.contract import EventType, JobStatus, Reason

_TEAM = {"team": "cells"}


def hang(scenes: Scenes) -> dict[str, str]:
    """Their ids, by what they are for."""
    found = {"reference": _reference(scenes)}
    found |= _family(scenes, found["reference"])
    found["failed"] = _failed(scenes)
    found["paused"] = _paused(scenes)
    _cancelled(scenes)
    found["running"] = _running(scenes)
    found["departed"] = _departed(scenes)
    found["recovering"] = _recovering(scenes)
    found["queued"] = scenes.submit(
        PRETRAIN, name="glass-vit-s-block-mask", ago=0.2, labels={"team": "glass"}, masking={"strategy": "block", "ratio": 0.5}
    )
    return found


def _reference(scenes: Scenes) -> str:
    job_id = scenes.submit(PRETRAIN, name="cells-vit-s-baseline", ago=70, labels=_TEAM | {"reference": "baseline"})
    scenes.attempt(job_id, ago=69.9)
    scenes.train(job_id, seed=1)
    steps = list(range(400, 4001, 400))
    scenes.evaluate(job_id, steps=steps, ago=69, best=0.74)
    scenes.pictures(job_id, steps=steps, ago=69)
    scenes.succeed(job_id, ago=58, metrics={"loss": 0.384, "knn_accuracy": 0.61, "probe_accuracy": 0.712})
    return job_id


def _family(scenes: Scenes, parent: str) -> dict[str, str]:
    """What was made of the reference's encoder."""
    found = {}
    for name, spec, accuracy in (("probe", PROBE, 0.748), ("finetune", FINETUNE, 0.883)):
        job_id = scenes.submit(
            spec,
            name=f"cells-vit-s-{name}",
            ago=50,
            labels=_TEAM,
            encoder={"init": "random"},
            model={"arch": "vit_small_patch16", "image_size": 224},
        )
        scenes.adopt(job_id, parent)
        scenes.attempt(job_id, ago=49)
        scenes.train(job_id, num_steps=900, floor=0.6 if name == "probe" else 0.2, seed=3)
        scenes.succeed(job_id, ago=47, metrics={"loss": 0.5, "accuracy": accuracy})
        found[name] = job_id
    return found


def _failed(scenes: Scenes) -> str:
    job_id = scenes.submit(PRETRAIN, name="roads-vit-b-lr-sweep-4", ago=30, labels={"team": "roads", "sweep": "lr"})
    scenes.attempt(job_id, ago=29.9)
    scenes.train(job_id, upto=0.18, seed=4, noise=0.03)
    last = list(range(721, 741))
    scenes.points(job_id, last, {"loss": [float("nan")] * 20, "grad_norm": [float("inf")] * 20})
    scenes.tell(job_id, 1, EventType.STEPS_DROPPED, ago=28.6, count=10, steps=[], step=730)
    detail = "10 steps in a row without a finite loss; the last: step 740 (loss nan, gradient norm inf)"
    scenes.end_attempt(job_id, ago=28.5, reason=Reason.DIVERGED, message=detail)
    scenes.move(job_id, JobStatus.FAILED, ago=28.5, reason=Reason.DIVERGED, detail=detail)
    return job_id


def _paused(scenes: Scenes) -> str:
    job_id = scenes.submit(PRETRAIN, name="plants-vit-s-multi-mask", ago=26, labels={"team": "plants"})
    scenes.attempt(job_id, ago=25.9)
    scenes.train(job_id, upto=0.62, seed=5)
    scenes.move(job_id, JobStatus.PAUSING, ago=20)
    scenes.end_attempt(job_id, ago=19.9)
    scenes.move(job_id, JobStatus.PAUSED, ago=19.9, reason=Reason.PAUSED_BY_USER)
    return job_id


def _cancelled(scenes: Scenes) -> None:
    job_id = scenes.submit(
        PROBE, name="plants-probe-wrong-folder", ago=22, labels={"team": "plants"}, encoder={"init": "random"}, model=PRETRAIN["model"]
    )
    scenes.move(job_id, JobStatus.CANCELLED, ago=21.9, reason=Reason.CANCELLED_BY_USER)


def _running(scenes: Scenes) -> str:
    job_id = scenes.submit(PRETRAIN, name="cells-vit-s-ratio-0.8", ago=5, labels=_TEAM | {"sweep": "ratio"}, masking={"ratio": 0.8})
    scenes.attempt(job_id, ago=4.9)
    scenes.train(job_id, upto=0.32, seed=6, floor=0.37)
    scenes.tell(job_id, 1, EventType.WORKERS_FAILED, ago=3.4, reason="worker_died", message="worker 2 ended with signal 9", step=1290)
    scenes.end_attempt(job_id, ago=3.4, reason=Reason.WORKER_DIED, message="worker 2 ended with signal 9")
    scenes.move(job_id, JobStatus.RECOVERING, ago=3.4, reason=Reason.WORKER_DIED)
    scenes.attempt(job_id, 2, ago=3.3)
    scenes.train(job_id, upto=0.64, seed=6, floor=0.37, number=2)
    steps = list(range(400, 2401, 400))
    scenes.evaluate(job_id, steps=steps, ago=4.5, best=0.69, number=2)
    scenes.pictures(job_id, steps=steps, ago=4.5, number=2)
    offset = 0
    for part in range(4):
        lines = [
            f"step {step:5d}  loss {1 / (1 + step / 900):.4f}  lr 5.8e-04  images/s 2148  wait 0.03"
            for step in range(part * 300 + 1, part * 300 + 301)
        ]
        offset = scenes.log(job_id, "\n".join(lines) + "\n", offset=offset, number=2)
    for rank in range(4):
        scenes.log(
            job_id, f"worker {rank} on node-{rank + 1}\ndevice cpu, 8 threads\nencoder 21.6 M parameters\n", worker=str(rank), number=2
        )
    return job_id


def _departed(scenes: Scenes) -> str:
    job_id = scenes.submit(PRETRAIN, name="cells-vit-s-lr-8e-4", ago=3, labels=_TEAM | {"sweep": "lr"})
    scenes.attempt(job_id, ago=2.9)
    scenes.train(job_id, upto=0.71, seed=8, drift=0.55)
    return job_id


def _recovering(scenes: Scenes) -> str:
    job_id = scenes.submit(PRETRAIN, name="roads-vit-b-1600", ago=1.5, labels={"team": "roads"}, priority=10)
    scenes.attempt(job_id, ago=1.4)
    scenes.train(job_id, upto=0.11, seed=9, floor=0.42)
    scenes.end_attempt(job_id, ago=0.1, reason=Reason.RAY_JOB_LOST)
    scenes.move(job_id, JobStatus.RECOVERING, ago=0.1, reason=Reason.RAY_JOB_LOST)
    return job_id
