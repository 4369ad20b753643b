"""A text file that names an image in each line, with a label or without: .txt, .csv or .tsv."""

import csv
import os
from contextlib import suppress
from pathlib import Path

from dino_sd.data.decode import EXTENSIONS
from dino_sd.data.files import (
    IMAGE_EXTENSIONS,
    FileSource,
    index_of_files,
    labels_from_index,
    labels_of_names,
    labels_to_index,
    order_by_name,
    read_file,
)
from dino_sd.data.index import Index, Strings
from dino_sd.errors import UserError

FORM = "a list of images (.txt .csv .tsv; in each line `path` or `path,label`, relative to the list)"
_LIST_EXTENSIONS = (".txt", ".csv", ".tsv")
_HEADERS = {
    "path", "paths", "file", "files", "filename", "filenames", "file_name", "filepath", "file_path",
    "image", "images", "img", "image_path", "image_file", "image_name", "name",
}  # fmt: skip
_BOM = b"\xef\xbb\xbf"
_UTF16 = (b"\xff\xfe", b"\xfe\xff")


def open(spec: str, channels: int) -> "ListSource | None":
    path = os.path.abspath(os.path.expanduser(spec))
    if not path.lower().endswith(_LIST_EXTENSIONS) or not os.path.isfile(path):
        return None
    index = index_of_files("list", [path], lambda: _index(path))
    return ListSource(spec, os.path.dirname(path), channels, index) if len(index["names_ends"]) else None


class ListSource(FileSource):
    """The images of a list, ordered by (file name, path) as those of a folder are, and labels as in `labels_of_names`.

    A line that comes twice is two images. Files are not looked for before they are read.
    """

    def __init__(self, name: str, root: str, channels: int, index: Index):
        super().__init__(name, channels, Strings.from_index(index, "names"), *labels_from_index(index), root)

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))


def _index(path: str) -> Index:
    try:
        data = Path(path).read_bytes().removeprefix(_BOM)
    except OSError as error:
        raise UserError(f"data: list '{path}' cannot be read ({error.strerror})") from error
    if data.startswith(_UTF16):
        raise UserError(f"data: list '{path}' is in UTF-16; save it as UTF-8")
    names, labels = _entries(data, path)
    order = order_by_name(names)
    text_of = {label: os.fsdecode(label) for label in set(labels)}
    labels_N, classes = labels_of_names([text_of[labels[place]] for place in order])
    return {**Strings.of(names[place] for place in order).to_index("names"), **labels_to_index(labels_N, classes)}


def _entries(data: bytes, path: str) -> tuple[list[bytes], list[bytes]]:
    """(names, labels), "" for none, of a list's lines in their order. Raises UserError for one that names no image."""
    names, labels, first = [], [], True
    for number, line in enumerate(data.split(b"\n"), start=1):
        line = line.strip()
        if not line or line.startswith(b"#"):
            continue
        name, label = _parted(line, b",") if b'"' not in line and b"\t" not in line else _unusual(line)
        if name.lower().endswith(IMAGE_EXTENSIONS):
            names.append(os.path.expanduser(name) if name.startswith(b"~") else name)
            labels.append(label)
        elif not first or not _is_header(line):
            raise UserError(
                f"data: line {number} of '{path}', '{os.fsdecode(line[:80])}', names no image; expected `path` or "
                f"`path,label`, and a path that ends in {' '.join(EXTENSIONS)}"
            )
        first = False
    return names, labels


def _parted(line: bytes, separator: bytes) -> tuple[bytes, bytes]:
    """(path, label) of a line: cut at its last separator, if what is before that ends like an image."""
    name, _, label = line.rpartition(separator)
    name = name.rstrip()
    return (name, label.strip()) if name.lower().endswith(IMAGE_EXTENSIONS) else (line, b"")


def _unusual(line: bytes) -> tuple[bytes, bytes]:
    """As `_parted`, of a line with a tab, or with a quote, which may be a part of the path."""
    fields = []
    if b'"' in line:
        delimiter = "\t" if b"\t" in line else ","
        with suppress(csv.Error):  # of a file that is no text
            fields = next(csv.reader([os.fsdecode(line)], delimiter=delimiter, skipinitialspace=True))
    if 1 <= len(fields) <= 2:
        name, label = [os.fsencode(field.strip()) for field in (*fields, "")][:2]
        if name.lower().endswith(IMAGE_EXTENSIONS):
            return name, label
    name, label = _parted(line, b"\t")
    return (name, label) if label else _parted(line, b",")


def _is_header(line: bytes) -> bool:
    return os.fsdecode(line).replace("\t", ",").split(",")[0].strip(' "').lower() in _HEADERS
