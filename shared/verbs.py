"""The verbs of a command; one verb's flags are declared only when that verb is used, so that `--help` is instant."""

from __future__ import annotations

import argparse
import difflib
import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NoReturn

from shared.commands import run_command
from shared.errors import UserError

if TYPE_CHECKING:
    from shared.settings import DaemonSettings

Run = Callable[[argparse.Namespace], int]
"""What runs a verb: its arguments -> the exit status."""


@dataclass(frozen=True)
class Verb:
    """One verb of a command.

    Args:
        name: as typed.
        help: one line in the command's `--help`.
        declare: adds description and flags to the verb's parser and returns what runs it: arguments -> exit status.
            It imports what it needs itself.
    """

    name: str
    help: str
    declare: Callable[[argparse.ArgumentParser], Run]


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in our one line; argparse would print the whole usage before it."""

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        arguments, unknown = self.parse_known_args(args, namespace)
        if unknown:
            verb = getattr(arguments, "parser", self)
            known = [option for action in verb._actions for option in action.option_strings]
            close = difflib.get_close_matches(unknown[0].partition("=")[0], known, n=1)
            hint = f"did you mean {close[0]}?" if close else f"see {verb.prog} --help for the list"
            raise UserError(f"unrecognized arguments: {' '.join(unknown)}; {hint}")
        return arguments

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{message}; see {self.prog} --help")


class _VerbParser(_Parser):
    verb: Verb | None = None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        if self.verb is not None:
            verb, self.verb = self.verb, None
            self.set_defaults(run=verb.declare(self), parser=self)
        return super().parse_known_args(args, namespace)


def run_verb(program: str, description: str, verbs: Sequence[Verb], argv: Sequence[str] | None) -> NoReturn:
    """Parse `argv`, run the verb it names, and exit with the codes of `shared.errors`."""
    parser = _Parser(prog=program, description=description)
    choices = parser.add_subparsers(metavar="VERB", required=True, parser_class=_VerbParser)
    for verb in verbs:
        choices.add_parser(verb.name, help=verb.help).verb = verb

    def command() -> int:
        arguments = parser.parse_args(argv)
        return int(arguments.run(arguments))

    sys.exit(run_command(command))


def settings_verb(load_model: Callable[[], type[DaemonSettings]]) -> Verb:
    """Return the verb `settings`: every effective setting and where it comes from."""

    def declare(parser: argparse.ArgumentParser) -> Run:
        from shared.settings import add_settings_flags

        model = load_model()
        parser.description = (
            "Show every setting as flags, environment, study file and defaults leave it, and its origin."
        )
        add_settings_flags(parser, model)
        parser.add_argument("--json", action="store_true", help="print JSON")
        return lambda arguments: _show_settings(model, arguments)

    return Verb("settings", "show the effective settings and where each comes from", declare)


def _show_settings(model: type[DaemonSettings], arguments: argparse.Namespace) -> int:
    from shared.settings import describe_settings, load_settings

    rows = describe_settings(load_settings(model, arguments))
    if arguments.json:
        print(json.dumps(rows, indent=2))
        return 0
    width = max(len(row["field"]) for row in rows)
    for row in rows:
        value = "-" if row["value"] is None else row["value"]
        print(f"{row['field']:{width}}  {value}  ({row['origin']})")
    return 0
