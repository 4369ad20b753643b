"""A folder of images: class folders, or any tree of files without labels."""

import os

import numpy as np

from dino_sd.data.decode import EXTENSIONS, picture
from dino_sd.data.source import Picture, Source, short_hash
from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL

FORM = "the path of a folder of images"
_UNLABELLED = (b"unlabelled", b"unlabeled")


def open(spec: str, channels: int) -> "FolderSource | None":
    root = os.path.expanduser(spec)
    return FolderSource(spec, root, channels) if os.path.isdir(root) else None


class FolderSource(Source):
    """All images below a folder, ordered by (file name, path).

    The order is by file name first, so that images keep their index, and with it their views, when they are sorted
    into class folders. Labels exist where every image lies below one of at least two first-level folders; one named
    `unlabelled` or `unlabeled`, in any case, is not counted, and its images have none.
    Raises UserError where there is no image.
    """

    def __init__(self, name: str, root: str, channels: int):
        self.name, self.channels = name, channels
        self._root = os.fsencode(os.path.abspath(root))
        paths = sorted(_image_paths(self._root), key=lambda path: (path.rpartition(b"/")[2], path))
        if not paths:
            raise UserError(f"data: no image in '{name}' or below; looked for {' '.join(EXTENSIONS)} in any case")
        # Two arrays in place of a million Python objects: workers share them, as nothing counts references in them.
        self._path_bytes = np.frombuffer(b"".join(paths), dtype=np.uint8)
        self._path_ends = np.cumsum([len(path) for path in paths])
        folders = [path.partition(b"/")[0] for path in paths if b"/" in path]
        classes = sorted(folder for folder in set(folders) if folder.lower() not in _UNLABELLED)
        if len(folders) == len(paths) and len(classes) >= 2:
            self.classes = [os.fsdecode(folder) for folder in classes]
            label_of = {folder: label for label, folder in enumerate(classes)}
            self._labels = np.array([label_of.get(folder, NO_LABEL) for folder in folders], dtype=np.int64)

    def __len__(self) -> int:
        return len(self._path_ends)

    def path(self, index: int) -> str:
        """The file of an image. Raises IndexError when there is no such image."""
        index = range(len(self))[index]
        start = self._path_ends[index - 1] if index else 0
        return os.fsdecode(os.path.join(self._root, self._path_bytes[start : self._path_ends[index]].tobytes()))

    def picture(self, index: int) -> Picture:
        path = self.path(index)
        try:
            with os.fdopen(os.open(path, os.O_RDONLY), "rb") as file:
                data = file.read()
        except OSError as error:
            raise UserError(f"{path}: cannot be read ({error.strerror}); repair or remove it") from error
        return picture(data, path, self.channels)

    def fingerprint(self) -> str:
        # The paths say all about the labels, unless some are hidden.
        hidden = [self._labels.tobytes()] if self._labels_hidden and self._labels is not None else []
        return short_hash(self._path_bytes.tobytes(), self._path_ends.tobytes(), *hidden)


def _image_paths(root: bytes) -> list[bytes]:
    """Paths below root, relative to it, of all images. Hidden files and folders are left out."""
    extensions = tuple(os.fsencode(extension) for extension in EXTENSIONS)
    paths: list[bytes] = []
    # Links are followed. A folder that is its own ancestor is a loop and is left; a folder seen twice is not.
    pending = [(b"", frozenset())]
    while pending:
        prefix, ancestors = pending.pop()
        folder = os.path.join(root, prefix)
        try:
            status = os.stat(folder)
            entries = list(os.scandir(folder))
        except OSError as error:
            raise UserError(f"data: folder '{os.fsdecode(folder)}' cannot be read ({error.strerror})") from error
        identity = (status.st_dev, status.st_ino)
        if identity in ancestors:
            continue
        for entry in entries:
            if entry.name.startswith(b"."):
                continue
            if entry.is_dir():
                pending.append((prefix + entry.name + b"/", ancestors | {identity}))
            elif entry.name.lower().endswith(extensions):
                paths.append(prefix + entry.name)
    return paths
