"""Hostile and broken archives: nothing is extracted or followed, nothing grows, and each is told in one line."""

import io
import os
import struct
import tarfile
import zipfile
import zlib

import pytest
from test_data_archives import images, tar_of, zip_of

from dino_sd.data.source import BadImage, open_source
from dino_sd.data.sources import zip as zips
from dino_sd.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dino_sd.data.index._WORTH_KEEPING", 1)


def hostile_names(png):
    names = ["../../up/1.png", "/etc/up/2.png", "./a/../a/3.png", "a/._4.png", ".b/5.png", "a/.6.png", "../.7.png"]
    return dict.fromkeys(names, png)


def test_names_that_leave_an_archive_are_only_names(tmp_path):
    files = hostile_names(images()["00.PNG"])
    for path in (tar_of(tmp_path / "x.tar", files), zip_of(tmp_path / "x.zip", files)):
        source = open_source(path, 3)
        inside = ["up/1.png", "etc/up/2.png", "a/a/3.png"]
        assert [source.path(index) for index in range(len(source))] == [f"{path}/{name}" for name in inside]
        assert source.classes == ["a", "etc", "up"] and source.read(0) == images()["00.PNG"]
    assert sorted(os.listdir(tmp_path)) == ["cache", "x.tar", "x.zip"]


def test_links_devices_and_folders_in_archives_are_left_out(tmp_path):
    png = images()["00.PNG"]
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        kinds = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE, tarfile.DIRTYPE)
        for number, kind in enumerate(kinds):
            member = tarfile.TarInfo(f"{number}.png")
            member.type, member.linkname = kind, "/etc/passwd"
            archive.addfile(member)
        member = tarfile.TarInfo("true.png")
        member.size = len(png)
        archive.addfile(member, io.BytesIO(png))
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        link = zipfile.ZipInfo("1.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, "/etc/passwd")
        archive.writestr("2.png/", "")
        archive.writestr("true.png", png)
    for path in ("x.tar", "x.zip"):
        source = open_source(str(tmp_path / path), 3)
        assert len(source) == 1 and source.path(0) == f"{tmp_path / path}/true.png" and source.read(0) == png


@pytest.mark.parametrize("cut", ["in a header", "in a file", "before the end", "broken header", "more behind the end"])
def test_a_tar_archive_that_is_not_whole(tmp_path, cut):
    path = tmp_path / "x.tar"
    tar_of(path, {"a.png": b"1" * 1000, "b.png": b"2" * 1000, "c.png": b"3" * 1000})
    data = bytearray(path.read_bytes())
    if cut == "broken header":
        data[1536 + 10] ^= 1
    elif cut == "more behind the end":
        data = data[: 3 * 1536 + 1024] + data
    else:
        data = data[: {"in a header": 1536 + 100, "in a file": 2 * 1536 + 700, "before the end": 3 * 1536}[cut]]
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"x.tar' is not a whole tar archive \(after byte [\d,]+: .*again") as caught:
        open_source(str(path), 3)
    assert "\n" not in str(caught.value)


def test_sizes_that_go_beyond_a_tar_archive(tmp_path):
    path = tmp_path / "x.tar"
    for size in (10**6, 2**40, -1536):
        member = tarfile.TarInfo("a.png")
        member.size = size
        path.write_bytes(member.tobuf(tarfile.GNU_FORMAT) + b"\0" * 4096)
        with pytest.raises(UserError, match="x.tar' is not a whole tar archive"):
            open_source(str(path), 3)
    # Cut after it was indexed: what is left is read, and the rest are bad images.
    tar_of(path, images())
    source = open_source(str(path), 3)
    path.write_bytes(path.read_bytes()[:4000])
    assert source.read(0) == images()["00.PNG"]
    with pytest.raises(BadImage, match=r"63.jpg: cannot be read \(the archive ends [\d,]+ bytes too early"):
        source.image(63)
    source._places[0, 2] = 2**31 + 1
    with pytest.raises(BadImage, match="bytes are more than"):
        source.image(0)


@pytest.mark.parametrize("mode", ["gz", "bz2", "xz"])
def test_a_compressed_tar_archive_says_what_to_do(tmp_path, mode):
    for name in (f"x.tar.{mode}", "x.tar"):
        with tarfile.open(tmp_path / name, f"w:{mode}") as archive:
            archive.addfile(tarfile.TarInfo("a.png"))
        with pytest.raises(UserError, match=f"{name}' is compressed, .*unpack it into a folder, or .* plain .tar"):
            open_source(str(tmp_path / name), 3)


def test_archives_without_images(tmp_path):
    for path in (tar_of(tmp_path / "x.tar", {"a.txt": b""}), zip_of(tmp_path / "x.zip", {"a.txt": b""})):
        with pytest.raises(UserError, match="is a file of no known kind, or holds no images"):
            open_source(path, 3)
    for name in ("y.tar", "y.zip"):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(UserError, match=f"{name}' is not a whole "):
            open_source(str(tmp_path / name), 3)


def test_a_zip_bomb_does_not_grow_beyond_what_it_declares(tmp_path):
    zip_of(tmp_path / "x.zip", {"a.png": b"\0" * 50_000_000})
    data = bytearray((tmp_path / "x.zip").read_bytes())
    at = data.index(b"PK\1\2") + 24
    data[at : at + 4] = struct.pack("<I", 1000)
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(BadImage, match=r"expands beyond the 1,000 bytes declared"):
        open_source(str(tmp_path / "x.zip"), 3).image(0)
    assert len(zips._inflated(zlib.compress(b"\0" * 10**7, wbits=-15), 10**7)) == 10**7


@pytest.mark.parametrize(
    ("reason", "local", "central", "value"),
    [
        ("encrypted", 6, 8, struct.pack("<H", 1)),
        ("compressed by method 12; only deflate, 8", 8, 10, struct.pack("<H", 12)),
        (r"2,147,483,649 bytes are more than", 22, 24, struct.pack("<I", 2**31 + 1)),
        ("its checksum is wrong", 14, 16, struct.pack("<I", 12345)),
        (r"holds [\d,]+ bytes where 99,999 are declared", 22, 24, struct.pack("<I", 99_999)),
        ("no file begins at byte 0", 0, 0, b"PK"),
    ],
)
def test_a_zip_member_that_cannot_be_read(tmp_path, reason, local, central, value):
    zip_of(tmp_path / "x.zip", {"a.png": images()["00.PNG"]})
    data = bytearray((tmp_path / "x.zip").read_bytes())
    if reason.startswith("no file"):
        data[2:4] = b"\0\0"
    else:
        for at in (local, data.index(b"PK\1\2") + central):
            data[at : at + len(value)] = value
    (tmp_path / "x.zip").write_bytes(data)
    with pytest.raises(BadImage, match=rf"x.zip/a.png: cannot be read \(.*{reason}"):
        open_source(str(tmp_path / "x.zip"), 3).image(0)


def test_a_zip_archive_that_is_not_whole(tmp_path):
    zip_of(tmp_path / "x.zip", images())
    data = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(data[: len(data) // 2])
    with pytest.raises(UserError, match="x.zip' is not a whole zip archive .*again"):
        open_source(str(tmp_path / "x.zip"), 3)
    broken = bytearray(data)
    broken[len(images()["00.PNG"]) // 2] ^= 255
    (tmp_path / "x.zip").write_bytes(broken)
    source = open_source(str(tmp_path / "x.zip"), 3)
    with pytest.raises(BadImage, match="00.PNG: cannot be read"):
        source.image(0)
    assert source.image(1).shape[0] == 3
