"""What jobs are found by: words of name and id, and labels, kept beside the job in the transaction that changes them."""

import re
import unicodedata

from sqlalchemy import delete, insert
from sqlalchemy.orm import Session

from service.models import JobLabelRow, JobRow, JobWordRow

MAX_WORD = 64
LAST = "\U0010ffff"  # sorts behind whatever begins in the same way


def words_of(text: str) -> list[str]:
    """Letters and digits of any script, without case, each word once; what joins words (spaces, `-`, `_`, `/`) is left out."""
    plain = unicodedata.normalize("NFKC", text).casefold()
    return list(dict.fromkeys(word[:MAX_WORD] for word in re.findall(r"[^\W_]+", plain)))


def index(session: Session, job: JobRow) -> None:
    """Have the job, which nothing finds yet, found by its name, id and labels."""
    words = words_of(f"{job.name} {job.id}")
    job.words = "".join(f" {word}" for word in words)
    place = {"job_id": job.id, "created_at": job.created_at}
    session.execute(insert(JobWordRow), [{"word": word, **place} for word in words])
    labels = dict.fromkeys(text for key, value in job.labels.items() for text in (key, f"{key}:{value}"))
    if labels:
        session.execute(insert(JobLabelRow), [{"label": label, "project": job.project, **place} for label in labels])


def forget(session: Session, job_id: str) -> None:
    """Have the job found by nothing."""
    for row in (JobWordRow, JobLabelRow):
        session.execute(delete(row).where(row.job_id == job_id))
