"""The page of the command line, from its own declarations."""

from typing import Any

import typer

from docs.generate import markdown
from docs.generate.markdown import code, docstring, prose, sentence, table
from service import cli
from service.user_errors import EXIT_CODES


def page() -> str:
    command = typer.main.get_command(cli.app)
    introduction = [docstring(cli), "`maestro COMMAND --help` says the same as this page."]
    return markdown.page("Command line", *introduction, "## Exit codes", _exit_codes(), *_sections(command, "maestro"))


def _exit_codes() -> str:
    return table(["code", "meaning"], [(code(number), sentence(meaning)) for number, meaning in EXIT_CODES.items()])


def _sections(command: Any, path: str) -> list[str]:
    """One for each command. `Any`, since typer has a click of its own, without a public name."""
    context = typer.Context(command, info_name=path)
    if hasattr(command, "commands"):
        return [part for name in command.list_commands(context) for part in _sections(command.commands[name], f"{path} {name}")]
    usage = " ".join([path, *command.collect_usage_pieces(context)])
    return [f"## {path}", prose(command.help or ""), f"```text\n{usage}\n```", table(["argument", "meaning"], _arguments(command, context))]


def _arguments(command: Any, context: typer.Context) -> list[tuple[str, str]]:
    shown = []
    for parameter in command.params:
        record = parameter.get_help_record(context)
        if record is not None and parameter.name != "help":
            meaning, _, extra = record[1].partition("  [")
            said = extra.rstrip("]").replace("required", "")
            shown.append((code(record[0]), f"{sentence(meaning)} {said and sentence(said)}".strip()))
    return shown
