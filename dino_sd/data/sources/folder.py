"""A folder of images: class folders, or any tree of files without labels."""

import os
import time

import torch

from dino_sd.data.decode import EXTENSIONS
from dino_sd.data.files import (
    IMAGE_EXTENSIONS,
    SETTLED,
    FileSource,
    by_name,
    labels_from_index,
    labels_of_folders,
    labels_to_index,
    read_file,
    stamp,
)
from dino_sd.data.index import Index, Strings, indexed
from dino_sd.data.source import short_hash
from dino_sd.errors import UserError

FORM = f"a folder of images at any depth ({' '.join(EXTENSIONS)}, in any case)"


def open(spec: str, channels: int) -> "FolderSource | None":
    root = os.path.abspath(os.path.expanduser(spec))
    if not os.path.isdir(root):
        return None
    index = indexed(f"folder {root}", lambda: _walk(root), lambda index: _unchanged(root, index))
    return FolderSource(spec, root, channels, index) if len(index["names_ends"]) else None


class FolderSource(FileSource):
    """All images below a folder, ordered by (file name, path), with labels as in `labels_of_folders`."""

    def __init__(self, name: str, root: str, channels: int, index: Index):
        super().__init__(name, channels, Strings.from_index(index, "names"), *labels_from_index(index), root)

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))

    def fingerprint(self) -> str:
        # The names say all about the labels, unless some are hidden.
        hidden = [self._labels.tobytes()] if self._labels_hidden and self._labels is not None else []
        return short_hash(self._names.hash(), *hidden)


def _unchanged(root: str, index: Index) -> bool:
    """Whether no folder has changed since the walk: a look at each, and at no file."""
    folders = Strings.from_index(index, "folders")
    paths = [os.path.join(os.fsencode(root), folders[i]) for i in range(len(folders))]
    return bool((index["stamps"][:, 2] < index["began"]).all()) and torch.equal(stamp(paths), index["stamps"])


def _walk(root: str) -> Index:
    """Names of all images below root and relative to it, sorted, and their labels; and the folders seen.

    Hidden files and folders are left out.
    """
    began = time.time_ns() - SETTLED
    names: list[bytes] = []
    folders: list[bytes] = []
    # Links are followed. A folder that is its own ancestor is a loop and is left; a folder seen twice is not.
    pending = [(b"", frozenset())]
    while pending:
        prefix, ancestors = pending.pop()
        folder = os.path.join(os.fsencode(root), prefix)
        try:
            status = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"data: folder '{os.fsdecode(folder)}' cannot be read ({error.strerror})") from error
        folders.append(prefix)
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            continue
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                pending.append((prefix + entry.name + b"/", ancestors | {identity}))
            elif entry.name.lower().endswith(IMAGE_EXTENSIONS):
                names.append(prefix + entry.name)
    stamps = stamp([os.path.join(os.fsencode(root), folder) for folder in folders])
    names = by_name(names)
    return {
        **Strings.of(names).to_index("names"), **labels_to_index(*labels_of_folders(names)),
        **Strings.of(folders).to_index("folders"), "stamps": stamps, "began": torch.tensor([began]),
    }  # fmt: skip
