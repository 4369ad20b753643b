"""A pattern that image files match, as in a shell: `photos/2024-*/*.jpg`, `photos/**/*.png`."""

import glob
import os

from dino_sd.data.files import IMAGE_EXTENSIONS, FileSource, by_name, labels_of_folders, read_file
from dino_sd.data.index import Strings

FORM = "a pattern with *, ?, [...] or ** that image files match, in quotes"


def open(spec: str, channels: int) -> "GlobSource | None":
    pattern = os.path.expanduser(spec)
    if not glob.has_magic(pattern):
        return None
    parts = pattern.split("/")
    fixed = next(place for place, part in enumerate(parts) if glob.has_magic(part))
    root = os.path.abspath("/".join([*parts[:fixed], ""]) or ".")
    if not os.path.isdir(root):
        return None
    names = _matches("/".join(parts[fixed:]), root)
    return GlobSource(spec, root, channels, by_name(names)) if names else None


class GlobSource(FileSource):
    """All image files that match, ordered by (file name, path); labels as in `labels_of_folders`, below the last folder
    in front of the first wildcard. Upper and lower case differ, as they do in a shell; hidden files are left out."""

    def __init__(self, name: str, root: str, channels: int, names: list[bytes]):
        super().__init__(name, channels, Strings.of(names), *labels_of_folders(names), root)

    def read(self, index: int) -> bytes:
        return read_file(self.path(index))


def _matches(pattern: str, root: str) -> list[bytes]:
    """Names of the image files that match below root, each once."""
    lines = {"": frozenset([_identity(root)])}  # of folders, with all that they lie in; empty for loops of links

    def line(folder: str) -> frozenset:
        if folder not in lines:
            above, identity = line(os.path.dirname(folder)), _identity(os.path.join(root, folder))
            lines[folder] = above | {identity} if above and identity not in above else frozenset()
        return lines[folder]

    names = []
    for name in set(glob.iglob(pattern, root_dir=root, recursive=True)):
        image = os.fsencode(name).lower().endswith(IMAGE_EXTENSIONS)
        # `**` follows a link to a folder above some forty times; a name with `..` was asked for as it is.
        if image and "/." not in f"/{name}" and line(os.path.dirname(name)):
            names.append(os.fsencode(name))
    return names


def _identity(folder: str) -> tuple[int, int]:
    status = os.stat(folder)
    return status.st_dev, status.st_ino
