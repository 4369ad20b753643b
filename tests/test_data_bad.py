"""Bad files never end a run: others stand in, they are listed, and only too many of them are an error."""

import json
import os
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import assert_identical, command, tiny_pairs
from PIL import Image

from dino_sd import checkpoint
from dino_sd.data.geometry import make_views
from dino_sd.data.source import BadImage, open_source
from dino_sd.data.statistics import statistics
from dino_sd.data.views import ViewGroup, ViewSpec
from dino_sd.errors import UserError
from dino_sd.train import train

SPEC = ViewSpec((ViewGroup(2, (24, 24), (0.4, 1.0)), ViewGroup(2, (12, 12), (0.05, 0.4))))


def photo(seed: int, size: tuple[int, int] = (160, 140)) -> Image.Image:
    noise = np.random.default_rng(seed).integers(0, 256, (5, 4, 3), dtype=np.uint8)
    return Image.fromarray(noise).resize(size, Image.Resampling.BICUBIC)


def bomb(path: Path) -> None:
    """A PNG of 20000x20000 pixels: one row, said to be that tall; the header alone must be enough."""
    import struct
    import zlib

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    compressor = zlib.compressobj(9)
    row = bytes(1 + 20000 * 3)
    body = b"".join(compressor.compress(row) for _ in range(20000)) + compressor.flush()
    header = struct.pack(">IIBBBBB", 20000, 20000, 8, 2, 0, 0, 0)
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b""))


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    """A hundred good JPEGs, some odd but good files, and bad ones."""
    root = tmp_path / "images"
    root.mkdir()
    for index in range(100):
        photo(index).save(root / f"good{index:03d}.jpg")
    photo(200).convert("CMYK").save(root / "odd_cmyk.jpg")
    palette = photo(201).quantize(16)
    palette.save(root / "odd_palette.png", transparency=bytes(range(0, 256, 16)))
    ramp = np.tile(np.linspace(0, 65535, 256).astype(np.uint16), (256, 1))
    Image.fromarray(ramp).save(root / "odd_ramp.png")
    (root / "bad_empty.jpg").write_bytes(b"")
    photo(203).save(root / "bad_cut.jpg")
    whole = (root / "bad_cut.jpg").read_bytes()
    (root / "bad_cut.jpg").write_bytes(whole[: len(whole) // 2])
    (root / "bad_text.jpg").write_text("this is a text file\n")
    bomb(root / "bad_bomb.png")
    photo(204).save(root / "bad_secret.jpg")
    (root / "bad_secret.jpg").chmod(0)
    photo(205).save(root / "bad_deleted.jpg")
    return root


def lines(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "bad_files.jsonl").read_text().splitlines()]


EXPECTED = {
    "bad_empty.jpg": "is empty, 0 bytes", "bad_cut.jpg": "Premature end", "bad_text.jpg": "no known image format",
    "bad_bomb.png": "decompression bomb", "bad_secret.jpg": "Permission denied", "bad_deleted.jpg": "No such file",
}  # fmt: skip


def test_a_run_over_bad_files(tiny_yaml: Path, hostile: Path, tmp_path: Path):
    """It ends with 0, and the report lists exactly the bad files; one is deleted while it runs."""
    run = tmp_path / "run"
    pairs = tiny_pairs(
        run, channels=3, data=hostile, workers=2, views__global__size=28, steps=40, batch_size=20, log__every=5
    )

    def delete() -> None:
        while not checkpoint.all_of(run) and time.monotonic() < deadline:
            time.sleep(0.01)
        (hostile / "bad_deleted.jpg").unlink()

    deadline = time.monotonic() + 120
    thief = threading.Thread(target=delete)
    thief.start()
    done = command("train", tiny_yaml, *pairs)
    thief.join()
    assert done.returncode == 0, done.stderr
    expected = dict(EXPECTED)
    if os.geteuid() == 0:  # whom no permission stops
        del expected["bad_secret.jpg"]
    found = {os.path.basename(line["path"]): line["reason"] for line in lines(run)}
    assert found.keys() == expected.keys()
    for name, reason in expected.items():
        assert reason in found[name]
    assert all(line["path"].startswith(str(hostile)) for line in lines(run))
    assert f"{len(expected)} image(s) could not be read" in done.stderr and "Traceback" not in done.stderr
    counts = [json.loads(line).get("bad_files") for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert counts[-1] == len(expected)


def test_the_same_run_on_two_ranks_and_after_a_cut(tiny, tiny_yaml: Path, hostile: Path, tmp_path: Path):
    """Stand-ins are the same images however many ranks there are, and a file is listed once, whoever meets it."""
    (hostile / "bad_deleted.jpg").unlink()
    options = {"channels": 3, "data": hostile, "precision": "fp64", "drop_path": 0.0, "batch_size": 20, "steps": 20}
    one = train(tiny(tmp_path / "one", **options))
    done = command("train", tiny_yaml, *tiny_pairs(tmp_path / "two", **options), ranks=2)
    assert done.returncode == 0, done.stderr
    first, second = (sorted(lines(tmp_path / name), key=lambda line: line["index"]) for name in ("one", "two"))
    assert first == second and len({line["path"] for line in first}) == len(first) >= 4
    for path in checkpoint.all_of(tmp_path / "one")[:1]:
        kept = tmp_path / path.name
        path.rename(kept)
        train(tiny(tmp_path / "one", **options))
        assert_identical(one, kept)
    assert sorted(lines(tmp_path / "one"), key=lambda line: line["index"]) == first


def test_odd_files_are_read_whole(hostile: Path):
    source = open_source(str(hostile), 3)
    named = {os.path.basename(source.path(index)): index for index in range(len(source))}
    for name in ("odd_cmyk.jpg", "odd_palette.png"):
        expected = np.asarray(Image.open(hostile / name).convert("RGBA" if "palette" in name else "RGB").convert("RGB"))
        assert np.array_equal(source.image(named[name]), expected.transpose(2, 0, 1))
    ramp = source.image(named["odd_ramp.png"])
    assert ramp.dtype == torch.uint8 and len(ramp.unique()) == 256
    alone = hostile.parent / "alone"
    alone.mkdir()
    (hostile / "odd_ramp.png").rename(alone / "ramp.png")
    source = open_source(str(alone), 1)
    assert source.dtype == torch.uint16 and len(np.unique(source.image(0).numpy())) == 256
    spec = ViewSpec((ViewGroup(1, (224, 224), (0.9, 1.0)),), channels=1)
    (crops,) = make_views(source, spec, 0, 0, np.arange(1)).groups
    assert crops.dtype == torch.uint16 and len(np.unique(crops.numpy())) > 200


def test_the_next_readable_image_stands_in(tmp_path: Path):
    for index in range(6):
        photo(index).save(tmp_path / f"{index}.jpg")
    good = make_views(open_source(str(tmp_path), 3), SPEC, 0, 0, np.arange(6))
    for index in (2, 3, 5):
        (tmp_path / f"{index}.jpg").write_bytes(b"")
    source = open_source(str(tmp_path), 3)
    views = make_views(source, SPEC, 0, 0, np.arange(6))
    assert views.indices.tolist() == [0, 1, 4, 4, 4, 0]
    assert {bad[0] for bad in views.bad} == {2, 3, 5}
    for ours, theirs in zip(views.groups, good.groups, strict=True):
        for index in (0, 1, 4):
            assert torch.equal(ours.unflatten(0, (2, 6))[:, index], theirs.unflatten(0, (2, 6))[:, index])
    assert all(torch.equal(a, b) for a, b in zip(views.rows, good.rows, strict=True))
    found = statistics(source)
    assert [bad[0] for bad in found.bad] == [2, 3, 5]


def test_only_bad_files(tiny, tmp_path: Path):
    root = tmp_path / "images"
    root.mkdir()
    for index in range(20):
        (root / f"{index}.jpg").write_text("no image")
    with pytest.raises(UserError, match=r"none of 20 images of .* can be read; the first, .*0.jpg: cannot be read as"):
        train(tiny(tmp_path / "run", channels=3, data=root))
    assert not (tmp_path / "run").exists()


def test_many_bad_neighbours_are_passed_over(tmp_path: Path):
    """A shard cut short, a folder half copied: what lies beside a bad image is often bad too."""
    for index in range(300):
        path = tmp_path / f"{index:03d}.png"
        if 100 <= index < 200:
            path.write_bytes(b"")
        else:
            Image.new("L", (20, 20), index % 256).save(path)
    source = open_source(str(tmp_path), 1)
    spec = ViewSpec((ViewGroup(1, (8, 8), (0.4, 1.0)),), channels=1)
    views = make_views(source, spec, 0, 0, np.arange(100, 164))
    assert not ((views.indices >= 100) & (views.indices < 200)).any() and len(set(views.indices.tolist())) > 30
    one = make_views(source, spec, 5, 7, np.arange(130, 131))  # of any run, any epoch, alone or in a batch
    assert one.indices[0] == views.indices[30]
    assert (views.groups[0][:, 0, 0, 0].numpy() == views.indices % 256).all()


def test_oversampled_bad_files_are_one_each(tiny, tmp_path: Path):
    images = tmp_path / "images"
    for index in range(40):
        target = images / (f"class{index % 2}" if index < 10 else "unlabelled")
        target.mkdir(parents=True, exist_ok=True)
        photo(index).save(target / f"{index:02d}.jpg")
    (images / "class1" / "03.jpg").write_bytes(b"")
    options = {"channels": 3, "data": images, "oversample": 70, "batch_size": 20, "steps": 60}
    train(tiny(tmp_path / "run", **options))
    assert [line["path"] for line in lines(tmp_path / "run")] == [str(images / "class1" / "03.jpg")]


@pytest.mark.parametrize("memory", [0, 1e9])
def test_bad_files_and_hidden_labels(tiny, tmp_path: Path, memory: float):
    """Which labels are kept, and what is bad, does not depend on where the images are held."""
    images = tmp_path / "images"
    for index in range(60):
        target = images / f"class{index % 2}"
        target.mkdir(parents=True, exist_ok=True)
        photo(index, (28, 28)).save(target / f"{index:02d}.png")
    for name in ("class1/05.png", "class0/08.png"):
        (images / name).write_bytes(b"")
    from dino_sd import build

    cfg = tiny(tmp_path / "run", channels=3, data=images, labelled=0.2, data__memory=memory, labelled_seed=3)
    source = build.open_data(cfg)
    plain = open_source(str(images), 3)
    plain.keep_labels(0.2, 3)
    kept = source.labels().copy()
    assert (source.stack is not None) == (memory > 0)
    expected = plain.labels().copy()
    if memory:
        expected[[5, 8]] = expected[[6, 9]]
    assert kept.tolist() == expected.tolist() and source.fingerprint() == plain.fingerprint()
    from dino_sd.data.source import labelled_only

    chosen = labelled_only(source)
    for index, where, _ in chosen.bad:
        assert chosen.path(index) == where


def test_a_pipe_and_an_empty_array_are_bad_files(tmp_path: Path):
    os.mkfifo(tmp_path / "a.png")
    np.save(tmp_path / "b.npy", np.zeros((0, 5), np.uint8))
    photo(1).save(tmp_path / "c.jpg")
    source = open_source(str(tmp_path), 3)
    found = statistics(source)
    assert [(index, reason) for index, _, reason in found.bad] == [
        (0, "cannot be read (it is no ordinary file)"),
        (1, "cannot be read as an image (holds no pixels)"),
    ]


def test_a_line_that_a_crash_cut_spoils_no_other(tmp_path: Path):
    from dino_sd.run import BadFiles

    (tmp_path / "bad_files.jsonl").write_text('{"index": 1, "path": "a", "reason": "x"}\n{"index": 2, "pa')
    bad = BadFiles(tmp_path, 100, 0.5)
    bad.add([(2, "b", "y"), (1, "a", "x"), (2, "b", "y")])
    assert bad.share() == 2
    assert [line["path"] for line in lines(tmp_path)] == ["a", "b"]


def test_a_run_that_goes_on_meets_later_ones_again(tmp_path: Path):
    from dino_sd.run import BadFiles

    bad = BadFiles(tmp_path, 100, 0.5)
    bad.add([(1, "a", "x"), (2, "b", "y")])
    assert bad.share() == 2
    again = BadFiles(tmp_path, 100, 0.5, until=1)  # it was saved before the second one was met
    assert [*again.known] == ["a"] and [line["path"] for line in lines(tmp_path)] == ["a"]
    again.add([(2, "b", "y")])
    assert again.share() == 2 and [line["path"] for line in lines(tmp_path)] == ["a", "b"]
    again.path.unlink()
    again.path.mkdir()  # cannot be written: a warning
    again.add([(3, "c", "z")])
    assert again.share() == 3


def test_bad_image_survives_a_process():
    import pickle

    error = pickle.loads(pickle.dumps(BadImage("a.jpg", "is empty")))
    assert (error.where, error.reason, str(error)) == ("a.jpg", "is empty", "a.jpg: is empty; repair or remove it")
