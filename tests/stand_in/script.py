"""What a simulated run does: its script travels in the job's labels, and the stand-in plays it."""

from enum import StrEnum
from typing import Any, Self

from pydantic import BaseModel, ConfigDict

LABEL = "script"


class Way(StrEnum):
    """How a run may die."""

    DRIVER = "driver"  # kill -9 of the driver: nobody says a last word
    WORKER = "worker"  # kill -9 of a worker: the driver starts all workers again, as often as it may
    SILENT = "silent"  # exit code 0, and no result
    COMMITTED = "committed"  # kill -9 of the driver after the commit of the result, before its last words
    DATA_ERROR = "data_error"  # the user's to mend
    OUT_OF_MEMORY = "out_of_memory"


class Death(BaseModel):
    """`attempt` 0: in each of them."""

    model_config = ConfigDict(frozen=True)

    attempt: int
    step: int
    way: Way


class Script(BaseModel):
    """How long a run takes, and how it dies. `step_seconds` is the time of one step, `start_seconds` that of the workers' start."""

    model_config = ConfigDict(frozen=True)

    num_steps: int = 10
    step_seconds: float = 0.3
    start_seconds: float = 0.2
    deaths: tuple[Death, ...] = ()

    @classmethod
    def of(cls, spec: Any) -> Self:
        return cls.model_validate_json(spec.labels.get(LABEL, "{}"))

    def labels(self) -> dict[str, str]:
        """For a spec."""
        return {LABEL: self.model_dump_json(exclude_defaults=True)}

    def death(self, attempt: int, step: int) -> Way | None:
        return next((death.way for death in self.deaths if death.step == step and death.attempt in (0, attempt)), None)


def loss_at(seed: int, step: int) -> float:
    """The loss of a simulated run: the same in every attempt, so that a run that was taken up wrongly is seen."""
    return 1.0 / step + seed / 2**31
