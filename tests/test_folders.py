"""A folder on this machine and one behind a URL behave alike."""

from pathlib import Path

import fsspec
import pytest

from lightning_gradnorm.folders import Folder


@pytest.fixture(params=["path", "string", "url", "odd name", "file url"])
def folder(request, tmp_path):
    yield {
        "path": tmp_path / "a" / "b",
        "string": f"{tmp_path}/a/b/",
        "url": "memory://a/b",
        "odd name": tmp_path / "lr[0.1]::*",
        "file url": f"file://{tmp_path}/a",
    }[request.param]
    fsspec.filesystem("memory").store.clear()
    fsspec.filesystem("memory").pseudo_dirs[:] = [""]


def test_what_is_written_is_read(folder):
    place = Folder(folder)
    assert not place.exists()
    assert not place.has("x.yaml")
    path = place.write("x.yaml", b"first")
    assert str(path) == f"{str(folder).rstrip('/')}/x.yaml"
    assert place.exists()
    assert place.has("x.yaml")
    assert place.read("x.yaml") == b"first"
    place.write("x.yaml", b"2")
    assert Folder(folder).read("x.yaml") == b"2"
    assert str(place) == str(folder)
    again, name = Folder.of_file(path)
    assert (again.read(name), name) == (b"2", "x.yaml")
    with pytest.raises(FileNotFoundError):
        place.read("y.yaml")


def test_files_are_found_by_their_names(folder):
    place = Folder(folder)
    for name in ("metrics.csv", "events.1", "events.0", "other"):
        place.write(name, name.encode())
    Folder(f"{str(folder).rstrip('/')}/below").write("metrics.csv", b"")
    assert place.find("events.*") == ["events.0", "events.1"]
    assert place.find("metrics.csv", below=True) == ["below/metrics.csv", "metrics.csv"]
    assert place.find("nothing*") == []
    with place.here("events.0", "other") as files:
        assert [file.read_bytes() for file in files] == [b"events.0", b"other"]
        assert all(isinstance(file, Path) for file in files)


def test_a_file_that_is_in_the_way_is_set_aside(folder):
    place = Folder(folder)
    place.set_aside("x.yaml")
    for content in (b"1", b"2", b"3"):
        place.set_aside("x.yaml")
        place.write("x.yaml", content)
    contents = {name: place.read(name) for name in place.find("*.yaml")}
    assert contents == {"x-v1.yaml": b"1", "x-v2.yaml": b"2", "x.yaml": b"3"}


def test_a_protocol_that_is_unknown():
    with pytest.raises(ValueError, match="nosuch"):
        Folder("nosuch://a/b")
