"""Tar archives, one or many: shards in the layout of WebDataset, or a packed folder. Read in place."""

import json
import os
import tarfile
from collections.abc import Iterator

import torch

from dino_sd.data.files import (
    IMAGE_EXTENSIONS,
    ArchiveSource,
    files_named,
    index_of_files,
    labels_of_members,
    labels_of_names,
    labels_to_index,
    member_name,
    order_by_name,
)
from dino_sd.data.index import Index, Strings
from dino_sd.errors import UserError

FORM = "tar archives (.tar: a file, a pattern, shard-{000..123}.tar, or a folder of them)"
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst")
_MAGICS = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ\0", b"\x28\xb5\x2f\xfd")  # gzip, bzip2, xz, zstd
_LARGEST_LABEL = 2**20  # bytes of a .cls or a .json; larger ones hold something else


def open(spec: str, channels: int) -> "TarSource | None":
    paths = files_named(spec, (".tar",))
    if paths is None:
        packed = files_named(spec, _COMPRESSED)
        if packed is not None:
            raise _compressed(packed[0])
        return None
    index = index_of_files("tar", paths, lambda: _index(paths))
    return TarSource(spec, channels, paths, index) if len(index["places"]) else None


class TarSource(ArchiveSource):
    """The images in tar archives, ordered by (file name, path), then archive and place in it.

    Files whose paths are the same up to the first dot of the file name are one sample: all that end like an image are
    images, and a .cls with a number or a name, or a .json with a "label", says their label. Where there is none of
    these, labels are as in `labels_of_folders`; a single folder that everything lies in is passed over.
    Links, devices, sparse and hidden files are left out.
    """

    def read(self, index: int) -> bytes:
        archive, offset, size = self._places[index].tolist()
        return self.read_at(archive, offset, size)


def _index(paths: list[str]) -> Index:
    names: list[bytes] = []
    places: list[tuple[int, int, int]] = []
    samples: list[tuple[int, bytes]] = []
    label_of: dict[tuple[int, bytes], str] = {}
    for archive, path in enumerate(paths):
        for opened, member in _members(path):
            name = member_name(os.fsencode(member.name))
            folder, slash, file = name.rpartition(b"/")
            sample, kind = (archive, folder + slash + file.partition(b".")[0]), file.lower()
            if kind.endswith(IMAGE_EXTENSIONS):
                names.append(name)
                places.append((archive, member.offset_data, member.size))
                samples.append(sample)
            elif kind.endswith((b".cls", b".json")) and member.size <= _LARGEST_LABEL:
                content = opened.extractfile(member)
                label = _label(kind, content.read() if content else b"", f"{path}/{os.fsdecode(name)}")
                if label and (kind.endswith(b".cls") or sample not in label_of):
                    label_of[sample] = label
    order = order_by_name(names)
    names = [names[place] for place in order]
    labelled = labels_of_names([label_of.get(samples[place], "") for place in order]) if label_of else (None, None)
    if not label_of:
        labelled = labels_of_members(names)
    return {
        **Strings.of(names).to_index("names"), **labels_to_index(*labelled),
        "places": torch.tensor([places[place] for place in order], dtype=torch.int64).reshape(-1, 3),
    }  # fmt: skip


def _members(path: str) -> Iterator[tuple[tarfile.TarFile, tarfile.TarInfo]]:
    """The regular files of an archive, by their headers alone. Raises UserError where it is not a whole one."""
    end = 0
    try:
        with os.fdopen(os.open(path, os.O_RDONLY), "rb") as file:
            if file.read(6).startswith(_MAGICS):
                raise _compressed(path)
        with tarfile.open(path, "r:") as archive:
            size = os.path.getsize(path)
            while (member := archive.next()) is not None:
                plain = member.isreg() and not member.issparse()
                if archive.offset <= end or (plain and member.offset_data + member.size > size):
                    raise tarfile.ReadError(f"'{member.name}' of {member.size} bytes goes beyond the end of the file")
                end = archive.offset
                if plain:
                    yield archive, member
                archive.members.clear()  # pyright: ignore[reportAttributeAccessIssue] - it would keep them all
            # Any header that makes no sense ends the walk quietly: only zeros may follow the last member.
            assert archive.fileobj is not None
            archive.fileobj.seek(end)
            rest = archive.fileobj.read(2**16)
            if not rest or rest.strip(b"\0"):
                raise tarfile.ReadError("a header is missing or broken" if rest else "its end is missing")
    except (tarfile.TarError, OSError, EOFError, ValueError) as error:
        raise UserError(
            f"data: '{path}' is not a whole tar archive (after byte {end:,}: {error}); fetch or write it again"
        ) from error


def _label(kind: bytes, content: bytes, where: str) -> str:
    """What a .cls or .json file says, "" for nothing. Numbers are written in one way, so that 07 is 7."""
    if kind.endswith(b".json"):
        try:
            value = json.loads(content)
        except (ValueError, RecursionError) as error:
            raise UserError(f"data: '{where}' cannot be read as JSON ({error}); repair or remove it") from error
        value = value.get("label") if isinstance(value, dict) else None
        return str(value) if isinstance(value, (int, str)) and not isinstance(value, bool) else ""
    text = content.decode("utf-8", "surrogateescape").strip()
    return str(int(text)) if text.isdecimal() and len(text) < 20 else text


def _compressed(path: str) -> UserError:
    return UserError(
        f"data: '{path}' is compressed, so images in it cannot be read one by one; unpack it into a folder, or write "
        "it again as a plain .tar"
    )
