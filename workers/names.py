"""Names that workers, service and users share. The standard library only: the command line starts with them."""

from enum import StrEnum

DRIVER = "driver"  # among the logs of an attempt: the others are named by their ranks


class JobStatus(StrEnum):
    """Where a job is. A terminal status never changes."""

    QUEUED = "queued"
    STARTING = "starting"
    RUNNING = "running"
    FINALIZING = "finalizing"
    RECOVERING = "recovering"
    PAUSING = "pausing"
    PAUSED = "paused"
    STOPPING = "stopping"
    SUCCEEDED = "succeeded"
    CANCELLED = "cancelled"
    FAILED = "failed"

    @property
    def is_terminal(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.FAILED)
