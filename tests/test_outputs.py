"""beit.outputs: what a command may write, decided before its work."""

import json

import pytest
from PIL import Image

from beit.errors import InputError
from beit.outputs import JSON_MARK, check_outputs, is_ours, png_mark


@pytest.fixture
def photograph(tmp_path):
    path = tmp_path / "photo.png"
    Image.new("RGB", (8, 8)).save(path)
    return path


def test_somebody_elses_files_are_replaced_only_when_told(photograph, tmp_path):
    (tmp_path / "notes.json").write_text('{"notes": "written by hand"}')
    for path in (photograph, tmp_path / "notes.json"):
        with pytest.raises(InputError, match="exists and was not written by beit; choose another name, or --overwrite"):
            check_outputs("--output", [path])
        assert check_outputs("--output", [path], overwrite=True) == [path]
    with pytest.raises(InputError, match="exist and were not written"):
        check_outputs("--show_dir", [photograph, tmp_path / "new.png", tmp_path / "notes.json"])


def test_what_the_library_has_written_is_known_by_its_mark(photograph, tmp_path):
    Image.open(photograph).save(photograph, pnginfo=png_mark())
    (tmp_path / "scores.json").write_text(json.dumps({**JSON_MARK, "mIoU": 0.5}, indent=2))
    (tmp_path / "of_0_1.html").write_text('<!DOCTYPE html>\n<meta name="generator" content="beit report">')
    ours = [photograph, tmp_path / "scores.json", tmp_path / "of_0_1.html"]
    assert all(map(is_ours, ours))
    assert check_outputs("--output", ours) == ours


def test_a_place_that_cannot_be_written_is_found_at_once(photograph, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert check_outputs("-o", ["~/new/folder/x.png"]) == [tmp_path / "new" / "folder" / "x.png"]
    assert not (tmp_path / "new").exists()  # nothing is made for the sake of looking
    with pytest.raises(InputError, match=r"-o .*: is a folder; name a file in it"):
        check_outputs("-o", [tmp_path])
    with pytest.raises(InputError, match=r"cannot be written, as .*photo\.png is no folder"):
        check_outputs("-o", [photograph / "x.png"])
    (tmp_path / "link.png").symlink_to(tmp_path / "gone.png")
    with pytest.raises(InputError, match=r"link\.png exists and was not written by beit"):
        check_outputs("-o", [tmp_path / "link.png"])
