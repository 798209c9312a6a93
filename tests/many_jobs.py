"""A database with as many jobs as one likes, written in bulk: what a service has after years."""

import random
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import islice
from typing import Any

from sqlalchemy import insert, text

from mae_core.config import RUN_SPEC
from service.db import Database
from service.models import EventRow, JobLabelRow, JobRow, JobWordRow
from service.search import words_of
from workers.contract import JobStatus

FIRST = datetime(2026, 1, 1, tzinfo=UTC)
APART = timedelta(seconds=60)
PROJECTS = {"default": 0.6, "cells": 0.39, "rare": 0.01}
STATUSES = {
    JobStatus.SUCCEEDED: 0.8,
    JobStatus.FAILED: 0.12,
    JobStatus.CANCELLED: 0.0795,
    JobStatus.PAUSED: 0.0005,
}
KINDS = {"pretrain": 0.5, "probe": 0.3, "finetune": 0.15, "embed": 0.0499, "evaluate": 0.0001}
TEAMS = ("cells", "roads", "glass", "plants")
_BATCH = 2000
_SPEC: dict[str, Any] = {
    "kind": "pretrain",
    "name": "many",
    "model": {"arch": "vit_tiny_patch2", "image_size": 8, "in_chans": 1},
    "data": {"source": "digits"},
    "optim": {"epochs": 2, "batch_size": 64, "warmup_epochs": 1},
}


def fill(database: Database, number: int, *, start: int = 0, seed: int = 0) -> list[dict[str, Any]]:
    """Adds jobs a minute apart, with what finds them and an event each, and has the database count them. Answers them, oldest first."""
    made = []
    jobs = _jobs(range(start, start + number), random.Random(seed + start))
    while batch := list(islice(jobs, _BATCH)):
        made += batch
        with database.write() as session:
            session.execute(insert(JobRow), batch)
            place = [(job, {"job_id": job["id"], "created_at": job["created_at"]}) for job in batch]
            session.execute(insert(JobWordRow), [{"word": word, **at} for job, at in place for word in job["words"].split()])
            labels = [{"label": label, "project": job["project"], **at} for job, at in place for label in _labels(job["labels"])]
            session.execute(insert(JobLabelRow), labels)
            session.execute(
                insert(EventRow), [{"job_id": job["id"], "type": "job_queued", "at": job["created_at"], "data": {}} for job in batch]
            )
    with database.engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE" if database.engine.dialect.name == "postgresql" else "PRAGMA optimize"))
    return made


def _jobs(places: range, chance: random.Random) -> Iterator[dict[str, Any]]:
    spec = RUN_SPEC.validate_python(_SPEC).model_dump(mode="json")
    for place in places:
        job_id, at = f"m{place:08d}{chance.randrange(36**4):08d}", FIRST + place * APART
        name = f"{chance.choice(TEAMS)}-vit-run{place}"
        kind, status = _draw(KINDS, chance), _draw(STATUSES, chance)
        yield {
            "id": job_id,
            "project": _draw(PROJECTS, chance),
            "name": name,
            "kind": kind,
            "labels": {"team": chance.choice(TEAMS), "sweep": str(place // 50)},
            "words": "".join(f" {word}" for word in words_of(f"{name} {job_id}")),
            "spec": spec | {"name": name},
            "body_hash": "0" * 64,
            "status": status,
            "desired_state": "run",
            "version": 7,
            "attempt": 1,
            "progress": {"step": 100, "num_steps": 100, "epoch": 2.0, "images_per_second": 250.5, "eta_seconds": 0.0, "loss": 0.5},
            "created_at": at,
            "started_at": at + APART / 2,
            "finished_at": at + APART if status.is_terminal else None,
        }


def _labels(labels: dict[str, str]) -> list[str]:
    return [label for key, value in labels.items() for label in (key, f"{key}:{value}")]


def _draw(shares: dict[Any, float], chance: random.Random) -> Any:
    return chance.choices(list(shares), list(shares.values()))[0]
