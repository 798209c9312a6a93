"""What ends a command of `maestro` with one line that says what is wrong and what to do, and its exit code."""

DONE = 0
COULD_NOT = 1
WRONG_USAGE = 2
UNREACHABLE = 3
REFUSED = 4
JOB_FAILED = 5
INTERRUPTED = 130

EXIT_CODES = {
    DONE: "done",
    COULD_NOT: "it could not be done here: a wrong spec, a full disk, a damaged file",
    WRONG_USAGE: "wrong usage",
    UNREACHABLE: "the service, or something behind it, does not answer: try again later",
    REFUSED: "the service refuses: no such job, not in this state, not with this token",
    JOB_FAILED: "the job that was watched has failed or was cancelled",
    INTERRUPTED: "interrupted",
}


class UserError(Exception):
    """Its text is for a person."""

    exit_code = COULD_NOT
