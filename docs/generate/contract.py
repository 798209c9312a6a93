"""The pages of events and of reasons: what `workers.contract` says of each."""

import inspect
import re
from enum import StrEnum

from docs.generate.markdown import code, page, sentence, table
from workers.contract import CONDITION_MESSAGES, REASON_RULES, WORKER_EVENTS, Condition, EventType, JobStatus, Reason, ReasonRule, Retry

_MEMBER = re.compile(r'^    [A-Z_]+ = "([a-z_]+)"  # (.+)$', re.MULTILINE)
_EVENTS = """What happens to a job is kept as events: `GET /v1/jobs/{id}/events` (as JSON, or as a stream), `GET /v1/events` for all jobs
of a project, and [webhooks](../how-to/webhooks.md). An event has an `id` (growing within a job), `type`, `at`, `attempt` and `data`. New
types, and new fields of data, may come; these stay."""
_REASONS = """A job has a status, and beside it a reason: why it waits, recovers or ended. `maestro show JOB` tells both, the reason's
message and a `detail`. [How to read a failed job](../how-to/read-a-failed-job.md) goes on from there."""


def comments_of(kind: type[StrEnum]) -> dict[str, str]:
    """What stands behind each member in the source."""
    return dict(_MEMBER.findall(inspect.getsource(kind)))


def events_page() -> str:
    told = comments_of(EventType)
    sections = [_event(event, told[event]) for event in EventType]
    return page("Events", _EVENTS, *sections)


def _event(event: EventType, comment: str) -> str:
    meaning, _, data = comment.partition("; data: ")
    who = "the workers" if event in WORKER_EVENTS else "the service"
    return f"## {event}\n\nTold by {who}. {sentence(meaning)}" + (f"\n\nData: {data}." if data else "")


def reasons_page() -> str:
    statuses = comments_of(JobStatus)
    return page(
        "Statuses and reasons",
        _REASONS,
        "## Statuses",
        table(
            ["status", "meaning", "ended"],
            [(code(status), sentence(statuses[status]), "yes" if status.is_terminal else "") for status in JobStatus],
        ),
        "## Conditions",
        "What is amiss with a job that goes on all the same.",
        table(["condition", "meaning"], [(code(condition), CONDITION_MESSAGES[condition]) for condition in Condition]),
        "## Reasons",
        *(_reason(reason) for reason in Reason),
    )


def _reason(reason: Reason) -> str:
    rule = REASON_RULES[reason]
    return f"### {reason}\n\n{rule.message}\n\n{_what_follows(rule)}"


def _what_follows(rule: ReasonRule) -> str:
    if rule.final_status is None:
        return "It ends no job."
    if rule.retry is Retry.NEVER:
        return f"The job is `{rule.final_status}`, and not tried again."
    budget = "max_failures" if rule.retry is Retry.INFRASTRUCTURE else "max_user_failures"
    return f"Tried again for as long as `retry.{budget}` allows it; then the job is `{rule.final_status}`."
