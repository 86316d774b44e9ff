"""Accept state files that a person edited: `python -m shared.seal FILE...` checks every field and renews the checksum.

Stop the daemon that writes the file first: it keeps the old content in memory and would write it again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from shared.errors import LabError, UserError
from shared.files import read_model, write_model
from shared.layout import matches
from shared.schemas import DOCUMENTS, Document


def document_at(path: Path) -> Document:
    """Return the kind of document that lies at `path`, judged by the end of the path.

    Raises:
        UserError: no document lies there.
    """
    parts = path.resolve().parts
    # Answers before requests: the pattern of a request fits an answer too.
    for document in sorted(DOCUMENTS, key=lambda document: -max(map(len, document.patterns))):
        for pattern in document.patterns:
            if matches(pattern, PurePosixPath(*parts[-len(PurePosixPath(pattern).parts) :])):
                return document
    raise UserError(f"{path}: not a file of a study folder; docs/file_formats.md lists them")


def seal(path: Path) -> None:
    """Renew the checksum of an edited file.

    Raises:
        UserError: no document lies there, or there is no such file.
        UnreadableFileError: a field is wrong; the file is untouched.
        DiskError: it could not be written.
    """
    document = document_at(path)
    try:
        write_model(path, read_model(path, document.model, edited=True))
    except FileNotFoundError as error:
        raise UserError(f"{path}: no such file") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Seal the files named on the command line; return the exit status."""
    parser = argparse.ArgumentParser(prog="python -m shared.seal", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("file", nargs="+", type=Path, help="an edited JSON file of a study folder")
    for path in parser.parse_args(arguments).file:
        try:
            seal(path)
        except LabError as error:
            print(error, file=sys.stderr)
            return error.exit_code
        print(f"{path}: accepted")
    return 0


if __name__ == "__main__":
    sys.exit(main())
