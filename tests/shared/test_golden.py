"""Every format has a golden file that reads, and every single-byte damage to one is refused."""

import random
import runpy
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from shared import format_docs
from shared.errors import UnreadableFileError
from shared.files import parse_model, read_model, read_or_set_aside, to_bytes
from shared.schemas import DOCUMENTS

FORMATS = Path(__file__).parent.parent / "data" / "formats"
GOLDEN = FORMATS / "v1"
EARLIER = FORMATS / "v1_earlier"
NOON = datetime(2025, 11, 15, 12, tzinfo=UTC)

every_document = pytest.mark.parametrize("document", DOCUMENTS, ids=[document.name for document in DOCUMENTS])


@pytest.fixture(scope="module")
def made():
    return runpy.run_path(str(FORMATS / "make_golden.py"))["documents"]()


def golden(document) -> bytes:
    return (GOLDEN / f"{document.name}.json").read_bytes()


def test_every_document_has_a_golden_file_and_every_golden_file_a_document():
    assert {path.name for path in GOLDEN.iterdir()} == {f"{document.name}.json" for document in DOCUMENTS}


@every_document
def test_a_golden_file_reads_as_what_was_written(document, made):
    assert read_model(GOLDEN / f"{document.name}.json", document.model) == made[document.name]


@pytest.mark.parametrize("path", sorted(EARLIER.iterdir()), ids=lambda path: path.stem)
def test_a_file_from_before_a_field_was_added_reads_and_lacks_only_that(path, made):
    model = type(made[path.stem])
    earlier = read_model(path, model)
    added = set(model.model_fields) - earlier.model_fields_set
    assert path.read_bytes() != (GOLDEN / path.name).read_bytes(), "a part of the file may have the new field"
    assert earlier == made[path.stem].model_copy(
        update={name: model.model_fields[name].get_default(call_default_factory=True) for name in added}
    )


@every_document
def test_the_golden_file_is_still_what_this_version_writes(document, made):
    assert to_bytes(made[document.name]) == golden(document), "a changed format needs golden files beside v1, not in it"


def test_the_documentation_is_current():
    assert format_docs.main(["--check"]) == 0, "run `python -m shared.format_docs`"


def test_a_stale_documentation_is_told(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(format_docs, "PAGE", tmp_path / "file_formats.md")
    assert format_docs.main(["--check"]) == 1
    assert "stale" in capsys.readouterr().err
    assert format_docs.main([]) == 0
    assert format_docs.main(["--check"]) == 0


@every_document
def test_every_field_is_described(document):
    commands = document.model.model_fields.get("root")
    models = [document.model] if commands is None else commands.annotation.__args__
    rows = [row for model in models for row in format_docs.rows(model)]
    assert rows
    assert [row.field for row in rows if not row.description.endswith(".")] == []


def substitutions(content: bytes, values: Iterable[int]) -> Iterator[bytes]:
    """Yield `content` with each byte replaced by each of `values` added to it."""
    for position, byte in enumerate(content):
        for value in values:
            yield content[:position] + bytes([(byte + value) % 256]) + content[position + 1 :]


def deletions(content: bytes) -> Iterator[bytes]:
    for position in range(len(content)):
        yield content[:position] + content[position + 1 :]


def insertions(content: bytes, seed: int) -> Iterator[bytes]:
    """Yield `content` with one byte more at each position, the end included: a blank, a line feed or any other."""
    chance = random.Random(seed)
    for position in range(len(content) + 1):
        extra = chance.choice([b" ", b"\n", bytes([chance.randrange(256)])])
        yield content[:position] + extra + content[position:]


def truncations(content: bytes) -> Iterator[bytes]:
    for length in range(0, len(content), 5):
        yield content[:length]


def accepted(damaged: Iterable[bytes], document) -> list[bytes]:
    """Return what of `damaged` a reader took, or took for a file of another version."""
    wrong = []
    for content in damaged:
        try:
            parse_model(content, Path("damaged.json"), document.model)
        except UnreadableFileError as error:
            if type(error) is UnreadableFileError:
                continue
        wrong.append(content)
    return wrong


@every_document
def test_a_byte_replaced_anywhere_is_refused(document):
    values = random.Random(document.name).sample(range(1, 256), 8)
    assert accepted(substitutions(golden(document), values), document) == []


@every_document
def test_a_byte_lost_anywhere_is_refused(document):
    assert accepted(deletions(golden(document)), document) == []


@every_document
def test_a_byte_added_anywhere_is_refused(document):
    assert accepted(insertions(golden(document), seed=7), document) == []


@every_document
def test_a_file_cut_anywhere_is_refused(document):
    assert accepted(truncations(golden(document)), document) == []


@pytest.mark.slow
@every_document
def test_a_byte_replaced_anywhere_by_any_other_is_refused(document):
    assert accepted(substitutions(golden(document), range(1, 256)), document) == []


@every_document
def test_a_damaged_file_is_refused_on_disk_and_set_aside_whole(document, tmp_path):
    content = golden(document)
    path = tmp_path / f"{document.name}.json"
    chance = random.Random(document.name)
    for position in chance.sample(range(len(content)), 40):
        byte = (content[position] + chance.randrange(1, 256)) % 256
        damaged = content[:position] + bytes([byte]) + content[position + 1 :]
        path.write_bytes(damaged)
        with pytest.raises(UnreadableFileError):
            read_model(path, document.model)
        reading = read_or_set_aside(path, document.model, NOON)
        assert reading.content is None
        assert reading.reason
        assert reading.set_aside is not None
        assert reading.set_aside.read_bytes() == damaged
        assert not path.exists()
    assert len(list(tmp_path.iterdir())) == 40, "an earlier set-aside file was overwritten"
