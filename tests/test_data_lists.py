"""Patterns and lists: what they match and what a line means. That they give a folder's views: test_data_archives.py."""

import os

import pytest
from test_data_archives import folder, images

from dino_sd.data.source import BadImage, open_source
from dino_sd.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("DINO_SD_CACHE", str(tmp_path / "cache"))


def test_a_pattern_follows_links_but_not_in_circles(tmp_path):
    folder(tmp_path / "x", {"a/1.jpg": b"1", "a/.2.jpg": b"2", ".b/3.jpg": b"3", "c/4.JPG": b"4", "c/5.txt": b"5"})
    (tmp_path / "x/a/loop").symlink_to(tmp_path / "x")
    (tmp_path / "x/d").symlink_to(tmp_path / "x/c")
    source = open_source(f"{tmp_path}/x/**/*", 3)
    names = [source.path(index).removeprefix(f"{tmp_path}/x/") for index in range(len(source))]
    assert names == ["a/1.jpg", "c/4.JPG", "d/4.JPG"]
    assert source.classes == ["a", "c", "d"] and source.read(1) == b"4"
    with pytest.raises(UserError, match="does not exist"):
        open_source(f"{tmp_path}/x/*.png", 3)


@pytest.mark.parametrize(
    ("text", "names", "labels"),
    [
        ("a.jpg\nb.PNG\n", ["a.jpg", "b.PNG"], None),
        ("\ufeffpath,label\r\na.jpg,cat\r\n\r\n# c\r\nb.jpg,\r\n", ["a.jpg", "b.jpg"], ["cat", None]),
        ("filename\tclass\na.jpg\t10\nb.jpg\t9\nc.jpg\t-1\n", ["a.jpg", "b.jpg", "c.jpg"], ["10", "9", None]),
        ("a, b/c d,e.jpg\nf,.jpeg , one two ", ["f,.jpeg", "a, b/c d,e.jpg"], ["one two", None]),
        (
            '"x, y.jpg","big, cat"\n5" z.jpg,dog\n"w.jpg"\n',
            ['5" z.jpg', "w.jpg", "x, y.jpg"],
            ["dog", None, "big, cat"],
        ),
        ('"p, q.jpg"\tcat\nr, "s" t.png,dog\n', ["p, q.jpg", 'r, "s" t.png'], ["cat", "dog"]),
        ("file.jpg,cat\nfile.jpg,cat\n", ["file.jpg", "file.jpg"], ["cat", "cat"]),
        ("~/b.jpg\n/c/a.jpg\n../d.jpg", ["/c/a.jpg", "HOME/b.jpg", "../d.jpg"], None),
    ],
)
def test_what_a_line_of_a_list_means(tmp_path, monkeypatch, text, names, labels):
    monkeypatch.setenv("HOME", "/home/of")
    (tmp_path / "list.txt").write_bytes(text.encode())
    source = open_source(str(tmp_path / "list.txt"), 3)
    expected = [os.path.join(tmp_path, name.replace("HOME", "/home/of")) for name in names]
    assert sorted(source.path(index) for index in range(len(source))) == sorted(expected)
    if labels is not None:
        label_of = {source.path(i): source.label(i) for i in range(len(source))}
        found = [label_of[path] for path in expected]
        assert [None if label is None else source.classes[label] for label in found] == labels
    if "10" in (labels or ()):
        assert source.classes == ["9", "10"]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        (b"a.jpg\nb.jpg 3\n", "line 2 of .*list.csv', 'b.jpg 3', names no image; expected `path` or `path,label`"),
        (b"label,path\ncat,a.jpg\n", "line 1 of .*'label,path', names no image"),
        (b"a.jpg,cat,3\n", "line 1 of"),
        ("a.jpg\n".encode("utf-16"), "is in UTF-16; save it as UTF-8"),
        (b"# nothing\n\n", "is a file of no known kind, or holds no images"),
    ],
)
def test_a_list_that_makes_no_sense(tmp_path, text, problem):
    (tmp_path / "list.csv").write_bytes(text)
    with pytest.raises(UserError, match=problem) as caught:
        open_source(str(tmp_path / "list.csv"), 3)
    assert "\n" not in str(caught.value)


def test_an_image_that_a_list_names_and_that_is_not_there(tmp_path):
    folder(tmp_path, {"00.PNG": images()["00.PNG"], "list.txt": b"00.PNG\ngone.jpg"})
    source = open_source(str(tmp_path / "list.txt"), 3)
    assert source.image(0).shape == (3, 30, 40)
    with pytest.raises(BadImage, match=r"gone.jpg: cannot be read \(No such file"):
        source.image(1)
