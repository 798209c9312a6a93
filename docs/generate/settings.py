"""The page of environment variables."""

from docs.generate import markdown, schema
from docs.generate.markdown import code
from service.settings import Settings

INTRODUCTION = """All of the service's settings are environment variables. `maestro up` sets them for the processes that it starts, so a
service on one machine needs none; [how to use PostgreSQL](../how-to/postgresql.md) shows a service that is configured by hand. One that
is missing or wrong is told at the start, with its remedy; values are never shown. Credentials of object storage are boto3's own variables
(`AWS_ACCESS_KEY_ID`, `AWS_SECRET_ACCESS_KEY`, or a role), on the service's machine and on those of the workers."""

# Variables that are no settings of the service: of whoever calls it, of tests, and what our processes tell each other.
OTHERS = {
    "MAESTRO_URL": "Command line: the service's address, with `MAESTRO_TOKEN`. Without both: the service that `maestro up` started.",
    "MAESTRO_TOKEN": "Command line: the token that `maestro tokens create` printed.",
    "MAESTRO_HOME": "Command line: the folder of `maestro up`'s state, where other commands find its service; by default `~/.maestro`.",
    "MAESTRO_SECRETS_DIR": "The service: a folder of files that are named as the settings, in small letters, and hold their values.",
    "MAESTRO_SECRETS": "Docker Compose: the folder of secrets that it hands to its services.",
    "MAESTRO_DATA_CACHE": "Workers: the folder in which a machine keeps shards; by default in the temporary folder.",
    "MAESTRO_DATA_CACHE_GB": "Workers: its size, 20 by default; at least 2 are needed for it to be of use.",
    "MAESTRO_TEST_DATA": "Tests: the folder of real images, by default `../shared/data`.",
    "MAESTRO_ORDER": "Set by the service for a run's driver: its order, as JSON.",
    "MAESTRO_RUN": "Set by `maestro up` for all that it starts: the mark by which it finds its processes again.",
    "MAESTRO_PART": "Set by `maestro up`: which of its parts a process is.",
}


def page() -> str:
    node = Settings.model_json_schema()
    required = set(node.get("required", ()))
    sections = [_setting(name, value, is_needed=name in required) for name, value in node["properties"].items()]
    others = [f"## {name}\n\n{meaning}" for name, meaning in OTHERS.items()]
    return markdown.page("Settings", INTRODUCTION, *sections, "# Other variables", *others)


def _setting(name: str, node: schema.Node, *, is_needed: bool) -> str:
    said = schema.in_words(node, str)
    default = "Needed" if is_needed else f"Default {code(node['default'])}" if node["default"] is not None else "Not set by default"
    secret = "secret, " if node.get("format") == "password" or "writeOnly" in str(node) else ""
    return f"## {Settings.model_config['env_prefix']}{name.upper()}\n\n{node['description']}\n\n{default}; {secret}{said}."
