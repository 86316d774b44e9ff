"""What every file has in common: strict models, and field types that carry their unit."""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import datetime
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, PlainSerializer

SCHEMA_VERSION: Literal[1] = 1
"""The version this program writes, and the only one so far."""


@dataclass(frozen=True)
class Unit:
    """The unit of a number, as the generated documentation shows it."""

    name: str


def _from_text(time: Any) -> Any:
    if not isinstance(time, str):
        return time
    if not re.match(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:", time):  # fromisoformat takes terser forms too
        raise ValueError("a time looks like 2025-11-15T10:23:45+08:00")
    return datetime.fromisoformat(time)


def _with_offset(time: datetime) -> datetime:
    """Return `time` with an offset; one without is local time, as the earlier scripts wrote it."""
    try:
        return time if time.utcoffset() is not None else time.astimezone()
    except OverflowError as error:
        raise ValueError("the time is too far away") from error


Time = Annotated[
    datetime,
    BeforeValidator(_from_text),
    AfterValidator(_with_offset),
    PlainSerializer(datetime.isoformat, when_used="json"),
    Unit("ISO 8601 with offset"),
]
Seconds = Annotated[float, Field(ge=0), Unit("s")]
Pixels = Annotated[int, Field(ge=1), Unit("px")]
Epoch = Annotated[int, Field(ge=0), Unit("epoch")]
Count = Annotated[int, Field(ge=0), Unit("count")]
Bytes = Annotated[int, Field(ge=0), Unit("bytes")]
Fraction = Annotated[float, Field(ge=0, le=1), Unit("0-1")]
Sha256 = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$"), Unit("SHA-256, hexadecimal")]
TrialNumber = Annotated[int, Field(ge=1), Unit("counted from 1")]
OptunaNumber = Annotated[int, Field(ge=0), Unit("counted from 0")]
Name = Annotated[str, Field(min_length=1)]
Scalar = str | int | float | bool
"""One hyperparameter or setting."""


class Record(BaseModel):
    """A part of a file: unknown fields, wrong types, NaN and infinities are refused, nothing can be reassigned."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


class VersionedFile(Record):
    """A whole file."""

    schema_version: Annotated[
        Literal[1],
        Field(description="Version of this format. A program refuses versions it does not know."),
    ] = SCHEMA_VERSION


def checksum_required(model: type[BaseModel]) -> bool:
    """Tell whether a file of this model is refused when it lacks its checksum; True unless the model says otherwise."""
    return bool(getattr(model, "checksum_required", True))
