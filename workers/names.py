"""Names that workers, service and users share. The standard library only: the command line starts with them."""

from enum import StrEnum

DRIVER = "driver"  # among the logs of an attempt: the others are named by their ranks


class JobStatus(StrEnum):
    """Where a job is. A terminal status never changes."""

    QUEUED = "queued"  # it waits for devices, for another job, or for its next attempt
    STARTING = "starting"  # Ray has its attempt; its workers are not up yet
    RUNNING = "running"  # its workers are up
    FINALIZING = "finalizing"  # the last step is taken; the result is being written
    RECOVERING = "recovering"  # its attempt failed; another one follows
    PAUSING = "pausing"  # it saves its training state
    PAUSED = "paused"  # it holds no device, until it is resumed
    STOPPING = "stopping"  # its workers are being stopped
    SUCCEEDED = "succeeded"  # its result is committed
    CANCELLED = "cancelled"  # it ended as its user wanted
    FAILED = "failed"  # it ended for the reason it has

    @property
    def is_terminal(self) -> bool:
        return self in (JobStatus.SUCCEEDED, JobStatus.CANCELLED, JobStatus.FAILED)
