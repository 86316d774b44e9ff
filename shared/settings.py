"""One settings model per daemon feeds flags, the study file (`--config`), environment variables and `--help`.

Flags beat environment variables, which beat the study file, which beats the defaults. The study file is TOML with one
table per daemon, so that both daemons can read the same file; relative paths in it are relative to the file.
"""

from __future__ import annotations

import argparse
import difflib
import errno
import os
import re
import shlex
import tomllib
import typing
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

from pydantic import ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    CliSettingsSource,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import (
    SettingsError as EnvDecodeError,
)

from shared.errors import DiskError, SettingsError

TABLES = ("optimizer", "evaluator")

TRAINER_TABLE = "trainer"
"""Beside them: one table below it for each trainer, with settings that only that trainer knows."""


class DaemonSettings(BaseSettings):
    """Base of both models. Every field has a description that names its unit.

    `table` is the model's table in the study file; environment variables are `<TABLE>_DAEMON_<FIELD>`.
    """

    model_config = SettingsConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)
    table: typing.ClassVar[str]

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """`load_settings` reads the sources itself, because an error must name the one it came from."""
        return (init_settings,)


S = TypeVar("S", bound=DaemonSettings)


@dataclass(frozen=True)
class LoadedSettings(Generic[S]):
    """The effective settings; `origins[field]` says where each came from, as the user wrote it."""

    settings: S
    origins: Mapping[str, str]


def add_settings_flags(parser: argparse.ArgumentParser, model: type[DaemonSettings]) -> None:
    """Add `--config` and one flag per field of `model`; unset flags stay out of the namespace."""
    parser.add_argument("--config", type=Path, metavar="FILE", help="study file (TOML); flags override it")
    _flag_source(parser, model)
    for action in parser._actions:  # argparse has no public way to read back what the settings source added
        action.help = action.help.removesuffix(" (default: None)") if action.help else action.help


def load_settings(
    model: type[S], arguments: argparse.Namespace, environment: Mapping[str, str] = os.environ
) -> LoadedSettings[S]:
    """Merge flags, environment and study file into one validated model.

    Args:
        arguments: parsed by a parser that `add_settings_flags` prepared for the same `model`.
    Raises:
        SettingsError: names the flag, variable or file and field, the value and the remedy.
    """
    fields = model.model_fields
    prefix = f"{model.table}_daemon_".upper()
    config: Path | None = arguments.config
    flags = {
        name: value
        for name, value in _flag_values(model, arguments).items()
        if name in fields and getattr(arguments, name, None) is not None
    }
    sources: list[tuple[dict[str, Any], Callable[[str], str]]] = [
        (_read_study_file(config, model) if config else {}, lambda field: f"{config} [{model.table}] {field}"),
        (_read_environment(model, prefix, environment), lambda field: prefix + field.upper()),
        (flags, lambda field: f"--{field.replace('_', '-')}"),
    ]
    values: dict[str, Any] = {}
    origins = dict.fromkeys(fields, "default")
    for found, name_of in sources:
        values.update(found)
        origins.update({field: name_of(field) for field in found})
    try:
        return LoadedSettings(model(**values), origins)
    except ValidationError as error:
        first = error.errors()[0]
        field = str(first["loc"][0]) if first["loc"] else next(iter(fields))
        where = origins[field] if origins[field] != "default" else f"--{field.replace('_', '-')}"
        raise SettingsError(where, _plain(first["input"]), _remedy(first, fields[field])) from error


def read_trainer_options(
    config: Path | None, trainer: str, known: Collection[str], *, chosen: bool, lines: Collection[str] = ()
) -> dict[str, Any]:
    """Return the study file's [trainer.<name>] table; empty without one.

    A text that starts with ./ or ../ is a path beside the file, and comes back absolute.

    Args:
        trainer: who trains.
        known: every trainer's name; one with a colon is somebody's own.
        chosen: somebody said who trains. Then the tables of other trainers are kept for another time; where it is a
            default, such a table shows that it was not the one that was meant.
        lines: settings that are a whole command line, of which the first word may be such a path.
    Raises:
        SettingsError: it is no table, or there is one that this study would not read.
    """
    if config is None:
        return {}
    document, text = _document(config)
    tables = document.get(TRAINER_TABLE, {})
    for name, table in tables.items():
        where = f"{config}{_line(text, f'{TRAINER_TABLE}.{name}')}: {TRAINER_TABLE}.{name}"
        if name not in known and ":" not in name:
            raise SettingsError(where, table, f"there is no such trainer{_did_you_mean(name, known)}")
        if name != trainer and not chosen:
            raise SettingsError(
                where, table, f"{trainer} trains, which does not read it; pass --trainer {name}, or take the table out"
            )
    options = tables.get(trainer, {})
    if not isinstance(options, dict):
        raise SettingsError(f"{config}: {TRAINER_TABLE}.{trainer}", options, f"write it as [{TRAINER_TABLE}.{trainer}]")
    return {
        name: _line_beside(config, value) if name in lines else _path_beside(config, value)
        for name, value in options.items()
    }


def make_writable_folder(setting: str, folder: Path) -> None:
    """Make `folder` where it is missing and see that files can be made in it.

    Args:
        setting: how the user named the folder, for messages.
    Raises:
        SettingsError: something else stands there, or it cannot be made or written.
        DiskError: the disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise DiskError(folder, error) from error
        raise SettingsError(setting, str(folder), f"name a folder that can be made ({error.strerror})") from error
    if not os.access(folder, os.W_OK | os.X_OK):
        raise SettingsError(setting, str(folder), "that folder cannot be written; name another or correct its rights")


def describe_settings(loaded: LoadedSettings[Any]) -> list[dict[str, Any]]:
    """One row per field: name, value (JSON-ready), origin, description."""
    shown = loaded.settings.model_dump(mode="json")
    return [
        {"field": name, "value": shown[name], "origin": loaded.origins[name], "description": info.description}
        for name, info in type(loaded.settings).model_fields.items()
    ]


def _flag_source(parser: argparse.ArgumentParser, model: type[DaemonSettings]) -> CliSettingsSource[Any]:
    return CliSettingsSource(
        model,
        root_parser=parser,
        cli_parse_args=False,
        cli_kebab_case=True,
        cli_implicit_flags=True,
        cli_hide_none_type=True,
        cli_avoid_json=True,
        formatter_class=argparse.HelpFormatter,
    )


def _flag_values(model: type[DaemonSettings], arguments: argparse.Namespace) -> dict[str, Any]:
    source = _flag_source(argparse.ArgumentParser(), model)
    given = {name: value for name, value in vars(arguments).items() if name in model.model_fields and value is not None}
    source(parsed_args=given)
    return source()


def _read_environment(model: type[DaemonSettings], prefix: str, environment: Mapping[str, str]) -> dict[str, Any]:
    given = {name: value for name, value in environment.items() if name.upper().startswith(prefix)}
    for name, value in given.items():
        if (field := name.upper().removeprefix(prefix).lower()) not in model.model_fields:
            raise SettingsError(name, value, f"there is no such setting{_did_you_mean(field, model.model_fields)}")
    source = EnvSettingsSource(model, env_prefix=prefix)
    source.env_vars = {name.lower(): value for name, value in given.items()}
    try:
        return source()
    except EnvDecodeError as error:
        name = next((n for n in given if n.upper().removeprefix(prefix).lower() in str(error)), prefix)
        raise SettingsError(name, given.get(name), 'write a JSON list, such as \'["a", "b"]\'') from error


def _read_study_file(file: Path, model: type[DaemonSettings]) -> dict[str, Any]:
    document, text = _document(file)
    for table, content in document.items():
        if table not in (*TABLES, TRAINER_TABLE) or not isinstance(content, dict):
            tables = ", ".join(f"[{name}]" for name in (*TABLES, f"{TRAINER_TABLE}.<name>"))
            hint = f"settings belong into one of the tables {tables}"
            raise SettingsError(f"{file}{_line(text, table)}: {table}", content, hint)
    values: dict[str, Any] = document.get(model.table, {})
    for field, value in values.items():
        if field not in model.model_fields:
            hint = f"there is no such setting{_did_you_mean(field, model.model_fields)}"
            raise SettingsError(f"{file}{_line(text, field)}: {field}", value, hint)
        if isinstance(value, bool) and model.model_fields[field].annotation is not bool:  # pydantic would read it as 1
            raise SettingsError(f"{file} [{model.table}] {field}", value, "write a value, not true or false")
    return {field: _beside(file, value, model.model_fields[field]) for field, value in values.items()}


def _document(file: Path) -> tuple[dict[str, Any], str]:
    """Return a study file's content and its text."""
    try:
        text = file.read_text(encoding="utf-8")
        return tomllib.loads(text), text
    except OSError as error:
        raise SettingsError("--config", str(file), f"name a readable TOML file ({error.strerror})") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise SettingsError("--config", str(file), f"mend the TOML ({error})") from error


def _path_beside(file: Path, value: Any) -> Any:
    if isinstance(value, list):
        return [_path_beside(file, item) for item in value]
    if isinstance(value, str) and value.startswith(("./", "../")):
        return str((file.parent / value).absolute())
    return value


def _line_beside(file: Path, value: Any) -> Any:
    """Make the program of a command line absolute; quoted, for the line is split as by a shell."""
    if not isinstance(value, str):
        return _path_beside(file, value)
    program, blank, arguments = value.partition(" ")
    beside = _path_beside(file, program)
    return value if beside == program else shlex.quote(beside) + blank + arguments


def _beside(file: Path, value: Any, info: FieldInfo) -> Any:
    """Make a relative path of the study file relative to that file."""
    if not _is_path(info.annotation):
        return value
    if isinstance(value, list):
        return [file.parent / item if isinstance(item, str) else item for item in value]
    return file.parent / value if isinstance(value, str) else value


def _is_path(annotation: Any) -> bool:
    return annotation is Path or any(_is_path(part) for part in typing.get_args(annotation))


def _line(text: str, key: str) -> str:
    """ " line N" of the key's first appearance, or nothing when it is written in an unusual way."""
    pattern = re.compile(rf"\s*\[?\[?[\"']?{re.escape(key)}[\"']?\s*[=.\]]")
    return next((f" line {n}" for n, line in enumerate(text.splitlines(), 1) if pattern.match(line)), "")


def _did_you_mean(word: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else "; see --help for the list"


def _plain(value: Any) -> Any:
    return str(value) if isinstance(value, Path) else value


def _remedy(error: Any, info: FieldInfo) -> str:
    """pydantic's sentence, lower-cased to follow ours, and what the field means."""
    message = str(error["msg"]).removeprefix("Value error, ")
    return f"{message[0].lower()}{message[1:]} ({info.description})"
