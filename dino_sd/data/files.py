"""Sources whose images are encoded files, wherever their bytes lie: the base class of most kinds in `sources/`."""

import glob
import os
import stat
import time
from abc import abstractmethod
from collections.abc import Callable, Sequence

import numpy as np
import torch

from dino_sd.data.decode import DEEP_EXTENSIONS, EXTENSIONS, native_dtype, picture
from dino_sd.data.index import Index, Strings, indexed
from dino_sd.data.source import BadImage, Picture, Source, short_hash
from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL

IMAGE_EXTENSIONS = tuple(os.fsencode(extension) for extension in EXTENSIONS)
LARGEST_FILE = 2**31  # bytes of an image; more is taken for an attack, or a mistake
SETTLED = 2_000_000_000  # ns; a file changed later than this before it was read may have changed after it in one tick
_SHALLOW_EXTENSIONS = tuple(extension for extension in IMAGE_EXTENSIONS if extension not in DEEP_EXTENSIONS)
_MOST_OPEN = 64  # archives at a time and process: a thousand files are all that many systems allow
_PROBED = 16
_DTYPES = (torch.uint8, torch.uint16, torch.float32)
_UNLABELLED = (b"unlabelled", b"unlabeled")
_NO_NAMES = {"", str(NO_LABEL)}


class FileSource(Source):
    """Images as encoded files. A subclass says how to read one.

    names: of the images, bytes below `root`; an image's place in them is its index. labels: int64 (N,) or None.
    dtype is that of half or more of a few images probed: uint8, uint16 or float32. Others are scaled to it.
    """

    def __init__(
        self,
        name: str,
        channels: int,
        names: Strings,
        labels: np.ndarray | None = None,
        classes: list[str] | None = None,
        root: str = "",
    ):
        self.name, self.channels, self.classes = name, channels, classes
        self._names, self._labels, self._root = names, labels, root
        self.dtype = self._probe()

    @abstractmethod
    def read(self, index: int) -> bytes:
        """The encoded file. Raises OSError, EOFError or ValueError where that fails."""

    def __len__(self) -> int:
        return len(self._names)

    def hold_as(self, dtype: torch.dtype) -> None:
        self.dtype = dtype

    def path(self, index: int) -> str:
        """Where an image lies, for messages. Raises IndexError when there is no such image."""
        return os.path.join(self._root, os.fsdecode(self._names[index]))

    def files(self) -> list[str]:
        return [self.path(index) for index in range(len(self))]

    def picture(self, index: int) -> Picture:
        return picture(self.encoded(index), self.path(index), self.channels, self.dtype)

    def encoded(self, index: int) -> bytes:
        """The encoded file. Raises BadImage where it cannot be read."""
        try:
            data = self.read(index)
        except OSError as error:
            raise BadImage(self.path(index), f"cannot be read ({error.strerror or error})") from error
        except (EOFError, ValueError) as error:
            raise BadImage(self.path(index), f"cannot be read ({error})") from error
        if not data:
            raise BadImage(self.path(index), "is empty, 0 bytes")
        return data

    def _probe(self) -> torch.dtype:
        """The type that half or more of some evenly spaced images have or surpass."""
        found = []
        for index in sorted({round(i * (len(self) - 1) / (_PROBED - 1)) for i in range(_PROBED)} if len(self) else ()):
            where, dtype = self.path(index), torch.uint8
            if not self._names[index].lower().endswith(_SHALLOW_EXTENSIONS):
                try:
                    dtype = native_dtype(self.encoded(index), where)
                except BadImage:  # met again, and reported, where it is wanted
                    continue
            found.append(dtype)
        return sorted(found, key=_DTYPES.index)[len(found) // 2] if found else torch.uint8

    def fingerprint(self) -> str:
        labels = b"" if self._labels is None else self._labels.tobytes()
        return short_hash(self._names.hash(), labels)


def read_file(path: str) -> bytes:
    """All of an ordinary file. Raises OSError or ValueError where it is none, or too large for an image."""
    # A pipe without a writer would be waited for without end.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    with os.fdopen(descriptor, "rb") as file:
        state = os.fstat(descriptor)
        if not stat.S_ISREG(state.st_mode):
            raise ValueError("it is no ordinary file")
        if state.st_size > LARGEST_FILE:
            raise ValueError(f"{state.st_size:,} bytes are more than {LARGEST_FILE:,}")
        return file.read()


class _Descriptor:
    """A file that is open as long as someone holds this."""

    number = -1

    def __init__(self, path: str):
        self.number = os.open(path, os.O_RDONLY)

    def __del__(self):
        if self.number >= 0:
            os.close(self.number)


class ArchiveSource(FileSource):
    """Images inside archives, which are read in place: nothing is ever extracted.

    index: `names` of the images; `places`, int64 (N, 1 or more), of which the first column says in which of the
    archives `paths` each lies, and a subclass knows the others; and what `labels_to_index` gave.
    """

    def __init__(self, name: str, channels: int, paths: list[str], index: Index):
        self._paths, self._places = paths, index["places"]
        self._open: dict[tuple[int, int], _Descriptor] = {}
        super().__init__(name, channels, Strings.from_index(index, "names"), *labels_from_index(index))

    def __getstate__(self) -> dict:
        return self.__dict__ | {"_open": {}}

    def path(self, index: int) -> str:
        name = os.fsdecode(self._names[index])
        return f"{self._paths[int(self._places[index, 0])]}/{name}"

    def files(self) -> list[str]:
        return self._paths

    def read_at(self, archive: int, offset: int, size: int) -> bytes:
        """Bytes of an archive. Raises ValueError where they are too many, or it ends before them."""
        if size > LARGEST_FILE:
            raise ValueError(f"{size:,} bytes are more than {LARGEST_FILE:,}")
        key = (os.getpid(), archive)  # a process that was forked opens its own
        if key not in self._open:
            if len(self._open) >= _MOST_OPEN:
                self._open.pop(next(iter(self._open)))
            self._open[key] = _Descriptor(self._paths[archive])
        file, parts = self._open[key], []
        while size and (part := os.pread(file.number, size, offset)):  # no more than 2 GiB less 4 KiB at once
            parts.append(part)
            size, offset = size - len(part), offset + len(part)
        if size:
            raise ValueError(f"the archive ends {size:,} bytes too early")
        return b"".join(parts)


def order_by_name(names: Sequence[bytes]) -> list[int]:
    """The places of names sorted by (file name, path), which lets images keep their index, and with it their views,
    when they are sorted into class folders, or packed. Equal names stay in the order given."""
    # Bytes compare faster than pairs do: a million names take 0.8 s, not 2.2.
    keys = [name.rpartition(b"/")[2] + b"\0" + name for name in names]
    return sorted(range(len(keys)), key=keys.__getitem__)


def by_name(names: list[bytes]) -> list[bytes]:
    """Sorted as in `order_by_name`."""
    return [names[place] for place in order_by_name(names)]


def member_name(name: bytes) -> bytes:
    """A name inside an archive, for labels and messages: below the archive, whatever it says. Empty for hidden ones."""
    parts = [part for part in name.split(b"/") if part not in (b"", b".", b"..")]
    return b"" if any(part.startswith(b".") for part in parts) else b"/".join(parts)


def labels_of_folders(names: Sequence[bytes]) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels int64 (N,), classes) where every image lies below one of at least two first-level folders, else Nones.

    A folder named `unlabelled` or `unlabeled`, in any case, is not counted, and its images have no label.
    """
    folders = [name.partition(b"/")[0] for name in names if b"/" in name]
    classes = sorted(folder for folder in set(folders) if folder.lower() not in _UNLABELLED)
    if len(folders) != len(names) or len(classes) < 2:
        return None, None
    label_of = {folder: label for label, folder in enumerate(classes)}
    labels_N = np.array([label_of.get(folder, NO_LABEL) for folder in folders], dtype=np.int64)
    return labels_N, [os.fsdecode(folder) for folder in classes]


def labels_of_members(names: Sequence[bytes]) -> tuple[np.ndarray | None, list[str] | None]:
    """As `labels_of_folders`; where all lie in one folder (`dataset/class/1.jpg`) the folders in it are looked at."""
    tops = {name[: name.find(b"/") + 1] for name in names}
    if len(tops) == 1:
        names = [name[len(next(iter(tops))) :] for name in names]
    return labels_of_folders(names)


def labels_of_names(names: Sequence[str]) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels int64 (N,), classes) of what a list says of each image; "" or "-1" is an image without a label.

    Classes are in order of their names, or of their numbers where all are whole numbers. Nones where no image has one.
    """
    classes = sorted(set(names) - _NO_NAMES)
    if not classes:
        return None, None
    if all(name.isdecimal() for name in classes):  # 07 is 7
        number_of = {name: str(int(name)) for name in classes}
        names = [number_of.get(name, "") for name in names]
        classes = sorted(set(number_of.values()), key=int)
    label_of = {name: label for label, name in enumerate(classes)} | dict.fromkeys(_NO_NAMES, NO_LABEL)
    return np.array([label_of[name] for name in names], dtype=np.int64), classes


def labels_to_index(labels_N: np.ndarray | None, classes: list[str] | None) -> Index:
    """What `labels_from_index` takes."""
    if labels_N is None or classes is None:
        return {}
    names = Strings.of(name.encode("utf-8", "surrogatepass") for name in classes)
    return {"labels": torch.from_numpy(labels_N), **names.to_index("classes")}


def labels_from_index(index: Index) -> tuple[np.ndarray | None, list[str] | None]:
    """(labels int64 (N,), classes) as they were given to `labels_to_index`."""
    if "labels" not in index:
        return None, None
    names = Strings.from_index(index, "classes")
    return index["labels"].numpy(), [names[i].decode("utf-8", "surrogatepass") for i in range(len(names))]


def files_named(spec: str, extensions: tuple[str, ...]) -> list[str] | None:
    """The files that a spec names: one file, `{000..123}` or `{a,b}`, a glob, or a folder that holds some.

    Sorted; None where it names no file with one of these extensions. Raises UserError where one of a numbered range is
    not there.
    """
    found = []
    for pattern in _expanded(os.path.expanduser(spec)):
        if os.path.isdir(pattern):
            found += [entry.path for entry in os.scandir(pattern) if not entry.name.startswith(".")]
        elif os.path.isfile(pattern) or not glob.has_magic(pattern):
            found.append(pattern)
        else:
            found += glob.glob(pattern, recursive=True)
    found = sorted(os.path.abspath(path) for path in set(found) if path.lower().endswith(extensions))
    for path in found:
        if not os.path.isfile(path):
            raise UserError(f"data: '{path}' does not exist" + ("" if path == spec else f" (named by '{spec}')"))
    return found or None


def _expanded(spec: str) -> list[str]:
    """`a-{00..02}.tar` -> a-00.tar, a-01.tar, a-02.tar; `{a,b}.tar` -> a.tar, b.tar. A file of that name is itself."""
    before, brace, rest = spec.partition("{")
    inner, closed, after = rest.partition("}")
    if not (brace and closed) or os.path.exists(spec):
        return [spec]
    first, dots, last = inner.partition("..")
    if dots and first.isdecimal() and last.isdecimal():
        middles = [str(number).zfill(len(first)) for number in range(int(first), int(last) + 1)]
    else:
        middles = inner.split(",")
    return [before + middle + end for middle in middles for end in _expanded(after)]


def stamp(paths: Sequence[str | bytes]) -> torch.Tensor:
    """What changes when a file or the list of a folder changes: int64 (N, 3) of inode, size and time in ns.

    Raises OSError where one is gone.
    """
    states = [os.stat(path) for path in paths]
    rows = [[state.st_ino % 2**63, state.st_size, state.st_mtime_ns] for state in states]
    return torch.tensor(rows, dtype=torch.int64).reshape(-1, 3)


def index_of_files(kind: str, paths: Sequence[str], build: Callable[[], Index]) -> Index:
    """`indexed`, for an index that these files alone decide: it is built again when one of them has changed."""

    def stamped() -> Index:
        began = time.time_ns() - SETTLED
        stamps = stamp(paths)  # first: a change while the index is built is noticed the next time
        return {**build(), "stamps": stamps, "began": torch.tensor([began])}

    def fresh(index: Index) -> bool:
        return bool((index["stamps"][:, 2] < index["began"]).all()) and torch.equal(stamp(paths), index["stamps"])

    return indexed("\n".join([kind, *paths]), stamped, fresh)
