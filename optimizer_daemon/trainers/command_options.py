"""The study file's [trainer.command] table."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, field_validator

from optimizer_daemon.collecting.patterns import Pattern
from optimizer_daemon.collecting.progress import GROUPS
from optimizer_daemon.lora_training.toml_file import closest
from optimizer_daemon.trainers.templates import names_in
from shared.errors import SettingsError
from shared.strict_json import first_fault

TABLE = "[trainer.command]"

_OF_PATTERNS = frozenset({"epoch", "step"})


def _words(value: Any) -> Any:
    if not isinstance(value, str):
        return value
    try:
        return shlex.split(value)
    except ValueError as error:  # a quotation mark without its other half
        raise ValueError(f"{error}; write the words as a list instead") from error


def _one_or_more(value: Any) -> Any:
    return [value] if isinstance(value, str) else value


Words = Annotated[list[str], BeforeValidator(_words)]
Texts = Annotated[list[str], BeforeValidator(_one_or_more)]


class CommandOptions(BaseModel):
    """How another program trains. Every text is a template, see optimizer_daemon.trainers.templates."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    command: Words = Field(min_length=1, description="the program and its arguments, a list or one line as for a shell")
    cwd: str | None = Field(None, min_length=1, description="folder it runs in; {output_dir} by default")
    env: dict[str, str] = Field(default_factory=dict, description="variables on top of the daemon's environment")
    files: dict[str, str] = Field(default_factory=dict, description="files to write into {files_dir}, name -> content")
    checkpoints: Texts = Field(
        default_factory=list,
        description="patterns of intermediate checkpoints below {output_dir}: *, **, {epoch}, {step}",
    )
    final: str | None = Field(None, description="pattern of the final checkpoint; by default the one of the last epoch")
    first_epoch: Literal[0, 1] = Field(1, description="the number its files give to the first epoch")
    steps_per_epoch: int | None = Field(
        None, ge=1, description="optimizer steps of one epoch, for programs that count steps"
    )
    state: str | None = Field(None, description="pattern below {output_dir} of the state it can go on from")
    resume: Words = Field(default_factory=list, description="arguments that make it go on from {state} or {state_dir}")
    progress: Texts = Field(
        default_factory=list, description="regular expressions of its progress; those of tqdm's bars by default"
    )
    patience_s: float = Field(600.0, gt=0, description="seconds without progress after which it counts as hung")
    stop_signal: Literal["SIGTERM", "SIGINT"] = Field("SIGTERM", description="what makes it save and end")
    holds_out: bool = Field(False, description="it leaves the held-out pictures out by itself, see {held_out}")
    unused: list[str] = Field(default_factory=list, description="parameters that it is not told")

    @field_validator("checkpoints")
    @classmethod
    def _numbered(cls, texts: list[str]) -> list[str]:
        for text in texts:
            if Pattern(text).unit is None:
                raise ValueError(f"{text!r} tells no checkpoint from another; write {{epoch}} or {{step}} into it")
        return texts

    @field_validator("final", "state")
    @classmethod
    def _below(cls, text: str | None) -> str | None:
        if text is not None:
            Pattern(text)
        return text

    @field_validator("env")
    @classmethod
    def _card(cls, env: dict[str, str]) -> dict[str, str]:
        if "CUDA_VISIBLE_DEVICES" in env:  # the card that trains has to be the one that is leased
            raise ValueError("CUDA_VISIBLE_DEVICES is the daemon's to set; choose the card with --device instead")
        return env

    @field_validator("files")
    @classmethod
    def _beside(cls, files: dict[str, str]) -> dict[str, str]:
        for name in files:
            path = PurePosixPath(name)
            if not name or path.is_absolute() or ".." in path.parts or name == "collect.json":
                raise ValueError(f"{name!r} is no name of a file below {{files_dir}}; correct it")
        return files

    @field_validator("progress")
    @classmethod
    def _expressions(cls, texts: list[str]) -> list[str]:
        for text in texts:
            try:
                groups = re.compile(text).groupindex
            except re.error as error:
                raise ValueError(f"{text!r} is no regular expression ({error})") from error
            if not groups or (unknown := sorted(set(groups) - GROUPS)):
                wrong = f"no group named {unknown[0]!r} is read" if groups else "it has no named group"
                raise ValueError(f"{text!r}: {wrong}; name them {', '.join(sorted(GROUPS))}")
        return texts

    @property
    def templates(self) -> dict[str, str]:
        """Return every text that the program is started with, by the setting that holds it."""
        parts = {"command": self.command, "resume": self.resume, "cwd": [self.cwd or ""]}
        found = {f"{TABLE} {name}": "\0".join(texts) for name, texts in parts.items()}
        found |= {f"{TABLE} env.{name}": text for name, text in self.env.items()}
        return found | {f"{TABLE} files.{name}": text for name, text in self.files.items()}

    @property
    def used(self) -> set[str]:
        """Return the placeholders that the program is started with."""
        return set().union(*map(names_in, self.templates.values()))

    @property
    def counts_steps(self) -> bool:
        """Whether a number of steps is asked for that only steps_per_epoch can tell."""
        patterns = [*self.checkpoints, self.final or ""]
        return any("{step}" in text for text in patterns) or bool({"max_train_steps", "save_every_n_steps"} & self.used)


def read_options(table: Mapping[str, Any]) -> CommandOptions:
    """Return the table, checked.

    Raises:
        SettingsError: a key is unknown, a value will not do, or something that is needed is missing.
    """
    for key in table:
        if key not in CommandOptions.model_fields:
            raise SettingsError(
                f"{TABLE} {key}",
                table[key],
                f"there is no such key{closest(key, CommandOptions.model_fields) or '; take it out'}",
            )
    if "command" not in table:
        raise SettingsError(f"{TABLE} command", None, "write the command line of the training program there")
    try:
        options = CommandOptions.model_validate(dict(table))
    except ValidationError as error:
        where = str(error.errors()[0]["loc"][0])
        raise SettingsError(
            f"{TABLE} {where}", table[where], first_fault(error, dict(table)).partition("; ")[2]
        ) from error
    if options.final is None and not options.checkpoints:
        raise SettingsError(
            f"{TABLE} final",
            None,
            "write where the program saves its weights below {output_dir}, such as '*.safetensors'",
        )
    if options.resume and options.state is None:
        raise SettingsError(f"{TABLE} state", None, "resume needs it: write where the program saves its state")
    if options.counts_steps and options.steps_per_epoch is None:
        raise SettingsError(
            f"{TABLE} steps_per_epoch", None, "the command or a pattern counts steps; write how many make an epoch"
        )
    return options
