"""Every exception this project raises on purpose, and the exit code each branch ends with.

    LabError                        1   never raised itself
    ├── UserError                   2   bad input: the message names the file, line or field, the value and the remedy
    │   ├── SettingsError               a flag, environment variable or TOML field
    │   ├── UnknownPluginError          a trainer, metric, renderer or workload nobody registered
    │   ├── AlreadyRunningError         the other holder of a lock is alive
    │   └── StudyMismatchError          the folder belongs to another study, plan or schema
    ├── ContractError               3   a file broke the contract of docs/file_formats.md
    │   ├── UnreadableFileError         not JSON, wrong fields, wrong checksum
    │   │   └── SchemaVersionError          whole, but of a schema version this program does not know
    │   └── CheckpointError             a checkpoint that must not be scored (see safetensors_file)
    │       ├── IncompleteCheckpointError   still being written, or truncated
    │       └── RefusedCheckpointError      whole, but malformed, hostile or worthless
    ├── ResourceError               4   GPU, disk, memory or model missing; worth retrying
    │   ├── DeviceBusyError             others need the device, or its memory, now: wait
    │   ├── DeviceMemoryError           the device's memory ran out
    │   └── DiskError                   ENOSPC, EIO and their kin while writing state
    └── Stopped                   130   an orderly stop by SIGINT (130) or SIGTERM (143)

`exit_code(error)` maps an instance to the process's exit status; anything outside the tree is a bug and keeps its
traceback.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path


class LabError(Exception):
    """Root of the tree."""

    exit_code = 1


class UserError(LabError):
    """Input a person can mend."""

    exit_code = 2


class SettingsError(UserError):
    """A setting has no usable value.

    Args:
        where: "--flag", "run.toml: field" or "ENVIRONMENT_VARIABLE", as the user wrote it.
        value: what was found there.
        remedy: what to write instead.
    """

    def __init__(self, where: str, value: object, remedy: str) -> None:
        super().__init__(f"{where}: {value!r} will not do; {remedy}")
        self.where = where


class UnknownPluginError(UserError):
    """A trainer, metric, renderer or workload nobody registered."""

    def __init__(self, kind: str, name: str, known: Iterable[str]) -> None:
        super().__init__(f"no {kind} named {name!r}; choose one of {', '.join(sorted(known))}")


class AlreadyRunningError(UserError):
    """Somebody alive holds the lock."""

    def __init__(self, path: Path, holder: str) -> None:
        super().__init__(f"{path} is held by {holder}; stop it first or use another folder")
        self.path = path


class StudyMismatchError(UserError):
    """The folder was made for something else than what was asked."""


class ContractError(LabError):
    """A file on disk is not what docs/file_formats.md promises."""

    exit_code = 3


class UnreadableFileError(ContractError):
    """A state file cannot be trusted.

    Args:
        path: the file.
        reason: what is wrong with it, with the field where one is known.
    """

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.reason = reason


class SchemaVersionError(UnreadableFileError):
    """A whole file of another version of this program; it must not be set aside as if it were damaged."""


class CheckpointError(ContractError):
    """A weight file that must not be scored.

    Args:
        path: the file.
        code: one short stable word, e.g. "overlap", recorded in evaluation_state.json.
        reason: the sentence for people.
    """

    def __init__(self, path: Path, code: str, reason: str) -> None:
        super().__init__(f"{path}: {reason}")
        self.path = path
        self.code = code
        self.reason = reason


class IncompleteCheckpointError(CheckpointError):
    """The file may still grow; look again later."""


class RefusedCheckpointError(CheckpointError):
    """The file is whole and will never be acceptable as it is."""


class ResourceError(LabError):
    """The machine lacks something; trying again later may work."""

    exit_code = 4


class DeviceBusyError(ResourceError):
    """Others need the device, or its memory, now; nothing is wrong, and waiting helps."""


class DeviceMemoryError(ResourceError):
    """The memory of the device ran out; whether others took it is not known here."""


class DiskError(ResourceError):
    """Writing state failed; the previous content is untouched."""

    def __init__(self, path: Path, error: OSError) -> None:
        super().__init__(f"{path}: could not be written ({error.strerror or error}); free space or repair the disk")
        self.path = path
        self.errno = error.errno


class Stopped(LabError):
    """An orderly stop was asked for by a signal."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by signal {signal_number}")
        self.exit_code = 128 + signal_number


def exit_code(error: BaseException) -> int:
    """Return the process exit status for `error`; 1 for anything outside the tree."""
    return error.exit_code if isinstance(error, LabError) else 1
