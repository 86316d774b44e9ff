"""Which pictures are held out, and that changed ones are refused."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from shared.errors import SettingsError, StudyMismatchError
from shared.held_out import hold_out, list_pictures, pictures_in, require_unchanged, study_pictures, with_held_out


def digests(count: int) -> list[str]:
    return [hashlib.sha256(str(i).encode()).hexdigest() for i in range(count)]


@pytest.mark.parametrize(("count", "held"), [(0, 0), (19, 0), (20, 3), (24, 4), (27, 4), (100, 15), (1000, 150)])
def test_15_percent_are_held_out_but_3_at_least_and_none_below_20(count, held):
    assert len(hold_out(digests(count), 42)) == held


def test_the_choice_depends_on_contents_and_seed_alone():
    contents = digests(40)
    assert hold_out(contents, 42) == hold_out([*reversed(contents), contents[0]], 42)
    assert hold_out(contents, 42) != hold_out(contents, 43)


def dataset(folder: Path, count: int) -> Path:
    (folder / "images").mkdir(parents=True)
    for i in range(count):
        (folder / "images" / f"{i:02d}.png").write_bytes(f"picture {i}".encode())
    (folder / "regular").mkdir()
    (folder / "regular" / "dog.png").write_bytes(b"regularisation")
    toml = folder / "dataset.toml"
    toml.write_text(
        '[[datasets]]\n[[datasets.subsets]]\nimage_dir = "images"\n[[datasets.subsets]]\n'
        'image_dir = "images"\n[[datasets.subsets]]\nimage_dir = "regular"\nis_reg = true\n'
    )
    return toml


def test_a_data_set_is_split_whatever_its_files_are_called(tmp_path):
    first = with_held_out(study_pictures(dataset(tmp_path / "a", 24)), 42)
    (tmp_path / "a" / "images").rename(tmp_path / "moved")
    for file in sorted((tmp_path / "moved").iterdir()):
        file.rename(file.with_name(f"x{file.name}"))
    (tmp_path / "moved").rename(tmp_path / "a" / "images")
    second = with_held_out(study_pictures(tmp_path / "a" / "dataset.toml"), 42)
    assert (len(first.held_out), len(first.training)) == (4, 20)
    assert {p.sha256 for p in first.held_out} == {p.sha256 for p in second.held_out}
    assert not {p.sha256 for p in first.held_out} & {p.sha256 for p in first.training}


def test_copies_of_a_held_out_picture_are_held_out_too(tmp_path):
    toml = dataset(tmp_path, 24)
    held = with_held_out(study_pictures(toml), 42).held_out[0]
    (tmp_path / "images" / "zz_copy.png").write_bytes(Path(held.path).read_bytes())
    again = with_held_out(study_pictures(toml), 42)
    assert [p.sha256 for p in again.held_out].count(held.sha256) == 2


def test_too_few_pictures_and_unreadable_data_sets_are_refused(tmp_path):
    with pytest.raises(SettingsError, match=r"19 different pictures.*only taken out of 20 or more"):
        with_held_out(study_pictures(dataset(tmp_path / "few", 19)), 42)
    (tmp_path / "broken.toml").write_text("[[datasets")
    with pytest.raises(SettingsError, match="name a readable kohya dataset TOML"):
        list_pictures(tmp_path / "broken.toml")
    (tmp_path / "odd.toml").write_text("datasets = 3")
    with pytest.raises(SettingsError, match="write its tables as kohya's"):
        list_pictures(tmp_path / "odd.toml")
    with pytest.raises(SettingsError, match="name a folder that holds pictures"):
        pictures_in(tmp_path / "none", "--reference-pictures")


def test_a_changed_or_missing_picture_is_refused(tmp_path):
    dataset(tmp_path, 3)
    pictures = pictures_in(tmp_path / "images", "--reference-pictures")
    require_unchanged(pictures, "held-out")
    Path(pictures[1].path).write_bytes(b"another")
    with pytest.raises(StudyMismatchError, match=r"01\.png: the content of this held-out picture"):
        require_unchanged(pictures, "held-out")
    Path(pictures[1].path).unlink()
    with pytest.raises(StudyMismatchError, match=r"01\.png: this held-out picture of the study cannot be read"):
        require_unchanged(pictures, "held-out")
