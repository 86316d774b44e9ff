"""The pictures a study began with, by content."""

from __future__ import annotations

from pydantic import Field

from shared.schemas.base import Name, Record, Sha256


class Picture(Record):
    """One picture file."""

    path: Name = Field(description="Where it lay at the first start.")
    sha256: Sha256 = Field(description="SHA-256 of the file's bytes.")


class StudyPictures(Record):
    """The data set as it was at the first start."""

    held_out: tuple[Picture, ...] = Field(
        default=(), description="Pictures that are never trained on; likeness is measured to them."
    )
    training: tuple[Picture, ...] = Field(
        default=(), description="Pictures that are trained on; the memorisation alarm looks for copies of them."
    )
