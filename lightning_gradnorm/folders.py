"""A folder of a run, on this machine or behind a URL that fsspec knows, such as ``s3://bucket/runs/7``."""

import contextlib
import fnmatch
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path

import fsspec
from fsspec.implementations.local import LocalFileSystem


class Folder:
    """Where files of a run are written and read.

    Args:
        url: a path, or a URL with ``://`` in it.
    """

    def __init__(self, url: str | Path) -> None:
        self.url = url
        if "://" in str(url):
            self._fs, root = fsspec.core.url_to_fs(str(url))
        else:
            self._fs, root = fsspec.filesystem("file"), os.path.abspath(url)
        self._root = root.rstrip("/") or root

    @classmethod
    def of_file(cls, path: str | Path) -> tuple["Folder", str]:
        """The folder that a file is in, and the file's name."""
        if "://" in str(path):
            folder, _, name = str(path).rpartition("/")
            return cls(folder), name
        return cls(Path(path).parent), Path(path).name

    def __str__(self) -> str:
        return str(self.url)

    def path(self, name: str) -> str | Path:
        """Of a file in it, as a person would write it."""
        return self.url / name if isinstance(self.url, Path) else f"{self.url.rstrip('/')}/{name}"

    def exists(self) -> bool:
        """Whether it is there."""
        return bool(self._fs.isdir(self._root))

    def has(self, name: str) -> bool:
        """Whether a file of this name is in it."""
        return bool(self._fs.isfile(f"{self._root}/{name}"))

    def find(self, *patterns: str, below: bool = False) -> list[str]:
        """Files whose name matches one of the patterns, in it or also below it: paths relative to it, sorted."""
        paths = self._fs.find(self._root, maxdepth=None if below else 1)
        matching = [path for path in paths if any(fnmatch.fnmatch(os.path.basename(path), pattern) for pattern in patterns)]
        return sorted(os.path.relpath(path, self._root) for path in matching)

    def read(self, name: str) -> bytes:
        """A file's content."""
        with self._fs.open(f"{self._root}/{name}", "rb") as stream:
            return bytes(stream.read())

    def write(self, name: str, content: bytes) -> str | Path:
        """Write a file, in the place of one of that name; the folder is made if it is not there. Returns the file's path."""
        self._fs.makedirs(self._root, exist_ok=True)
        with self._fs.open(f"{self._root}/{name}", "wb") as stream:
            stream.write(content)
        return self.path(name)

    def set_aside(self, name: str) -> None:
        """Where there is a file of this name, give it the first free one of ``name-v1``, ``name-v2``, …"""
        if not self.has(name):
            return
        stem, suffix = os.path.splitext(name)
        number = 1
        while self._fs.exists(f"{self._root}/{stem}-v{number}{suffix}"):
            number += 1
        # One file, as it is named: mv() and copy() read brackets as patterns in older versions.
        self._fs.cp_file(f"{self._root}/{name}", f"{self._root}/{stem}-v{number}{suffix}")
        self._fs.rm_file(f"{self._root}/{name}")

    @contextlib.contextmanager
    def here(self, *names: str) -> Iterator[list[Path]]:
        """These files on this machine: where they are, or copies for as long as the context lasts."""
        if isinstance(self._fs, LocalFileSystem):
            yield [Path(self._root, name) for name in names]
            return
        with tempfile.TemporaryDirectory() as copies:
            for name in names:
                Path(copies, name).write_bytes(self.read(name))
            yield [Path(copies, name) for name in names]
