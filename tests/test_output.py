import json
from dataclasses import dataclass

import pytest

from tracelens.errors import OutputError, ResultFileError
from tracelens.output import MARKER, check_folder, decode, encode, read_marker, reading, staged, write_atomically
from tracelens.stats import Estimate

KIND = "tracelens_thing"


def write(folder, text="one"):
    with staged(folder, KIND) as new:
        (new / "part").mkdir()
        (new / "part" / "table.csv").write_text(text)
        (new / MARKER).write_text(json.dumps({KIND: 1, "text": text}))


def everything(folder):
    return {str(path.relative_to(folder)): path.read_text() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_is_made_and_written_again(tmp_path):
    folder = tmp_path / "deep" / "out"
    write(folder)
    (folder / "notes.txt").write_text("mine")
    write(folder, "two")
    found = everything(folder)
    assert found.keys() == {MARKER, "part/table.csv", "notes.txt"}
    assert (found["part/table.csv"], found["notes.txt"]) == ("two", "mine")
    assert [path.name for path in folder.parent.iterdir()] == ["out"]


@pytest.mark.parametrize("before", [None, "one"])
def test_an_interrupted_write_changes_nothing_and_can_be_repeated(tmp_path, before):
    folder = tmp_path / "out"
    if before:
        write(folder, before)
    found = everything(tmp_path)
    with pytest.raises(KeyboardInterrupt), staged(folder, KIND) as new:  # noqa: PT012
        (new / "half.csv").write_text("ha")
        raise KeyboardInterrupt
    assert everything(tmp_path) == found
    write(folder, "two")
    assert everything(folder)["part/table.csv"] == "two"


def test_the_marker_goes_last(tmp_path, monkeypatch):
    """Whatever stops the move itself, a folder with a version in its marker is whole."""
    from pathlib import Path

    moved = []
    replace = Path.replace
    monkeypatch.setattr(Path, "replace", lambda self, target: (moved.append(self.name), replace(self, target))[1])
    write(tmp_path / "out")
    assert moved[0].startswith(f".{MARKER}")  # says that the folder is unfinished
    assert moved[1:] == ["table.csv", MARKER]


@pytest.mark.parametrize("before", [None, "one"])
def test_an_interrupted_move_leaves_no_mixture_and_can_be_repeated(tmp_path, monkeypatch, before):
    from pathlib import Path

    folder = tmp_path / "out"
    if before:
        write(folder, before)
    replace = Path.replace

    def move(self, target):
        if self.name == "table.csv":
            raise KeyboardInterrupt
        return replace(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", move)
        with pytest.raises(KeyboardInterrupt):
            write(folder, "two")
    with pytest.raises(ResultFileError, match="out was not written to the end; write it again"):
        read_marker(folder, KIND, 1)
    write(folder, "two")
    assert read_marker(folder, KIND, 1) == {"text": "two"}


def test_a_check_makes_nothing(tmp_path):
    assert not check_folder(tmp_path / "new", KIND).exists()


def test_folders_of_others_are_refused(tmp_path):
    (tmp_path / "thesis.tex").write_text("years of work")
    with pytest.raises(OutputError, match=r"was not written by Tracelens; give a new or empty folder"):
        check_folder(tmp_path, KIND)
    with pytest.raises(OutputError, match="is a file; give a folder"):
        check_folder(tmp_path / "thesis.tex", KIND)
    write(tmp_path / "other")
    with pytest.raises(OutputError, match="other exists"):
        check_folder(tmp_path / "other", "tracelens_another_thing")
    foreign = tmp_path / "foreign"
    foreign.mkdir()
    (foreign / MARKER).write_text('{"some": "report"}')
    with pytest.raises(OutputError), staged(foreign, KIND):
        pass
    assert everything(tmp_path)["thesis.tex"] == "years of work"
    assert [path.name for path in foreign.iterdir()] == [MARKER]


def test_text_is_whole_or_not_there(tmp_path):
    path = write_atomically(tmp_path / "deep" / "page.html", "ü")
    assert path.read_text(encoding="utf-8") == "ü"
    with pytest.raises(UnicodeEncodeError):
        write_atomically(path, "half \ud800")
    assert path.read_text(encoding="utf-8") == "ü"
    assert [p.name for p in path.parent.iterdir()] == ["page.html"]


@dataclass(frozen=True)
class Inner:
    x: float
    e: Estimate


@dataclass(frozen=True)
class Outer:
    name: str | None
    rows: tuple[int, ...]
    by: dict[str, Inner]
    maybe: Inner | None


def test_dataclasses_as_json_and_back():
    inner = Inner(0.1, Estimate(1.0, 0.5, 1.5, 3, "bootstrap"))
    for outer in (Outer("a", (1, 2), {"k": inner}, inner), Outer(None, (), {}, None)):
        assert decode(Outer, json.loads(json.dumps(encode(outer), allow_nan=False))) == outer
    missing = decode(Inner, json.loads(json.dumps(encode(Inner(float("nan"), inner.e)), allow_nan=False)))
    assert missing.x != missing.x


def test_results_of_another_version_and_other_files_are_named(tmp_path):
    (tmp_path / MARKER).write_text('{"thing": 99}')
    with pytest.raises(ResultFileError, match="written by another version of Tracelens; this one reads version 1"):
        read_marker(tmp_path, "thing", 1)
    with pytest.raises(ResultFileError, match="is not a thing: KeyError"), reading(tmp_path, "a thing"):
        read_marker(tmp_path, "other", 1)
