"""Pictures: what they are made of agrees with numpy and brute force, and the files that commands write show it."""

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from test_errors import run_cli
from torch import Tensor

from dino_sd import gallery
from dino_sd.components import coordinates, principal_components, split_in_two
from dino_sd.config import NeighboursSettings, PrototypesSettings
from dino_sd.data.source import open_source
from dino_sd.embed import embed
from dino_sd.errors import UserError
from dino_sd.loading import load_model
from dino_sd.maps import map_figure
from dino_sd.models.attention import class_attention
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import ProjectionHead
from dino_sd.models.model import Model
from dino_sd.models.pixels import Pixels
from dino_sd.pictures import (
    SIDE,
    attention_picture,
    attention_sheet,
    attention_tiles,
    most_of,
    neighbour_sheet,
    patch_components,
    pca_sheet,
)
from dino_sd.prototypes import most_used
from dino_sd.seen import as_image, cells, pixels_for_the_eye, see, seen_size
from dino_sd.tiles import Tile, table
from dino_sd.video import Clip, open_clip

SMALL = {"patch_size": 7, "embed_dim": 24, "depth": 2, "num_heads": 3}
MINI = "fashion-mnist-mini:test"


def model_of(name: str = "vit_tiny_patch16_224", size: int = 28, channels: int = 3, **args) -> Model:
    torch.manual_seed(0)
    args = {**SMALL, **args} if name.startswith("vit") else args
    backbone = Backbone(name, size=(size, size), channels=channels, model_args=args).eval().requires_grad_(False)
    for parameter in backbone.parameters():
        parameter.add_(torch.randn_like(parameter) * 0.2)
    return Model(backbone, (size, size), 0.875, [0.5] * channels, [0.25] * channels, name, {})


def photo(seed: int = 0, size: tuple[int, int] = (60, 45)) -> Image.Image:
    """A light disc, somewhere, on a dark ground with some noise."""
    generator = np.random.default_rng(seed)
    x, y = np.meshgrid(np.linspace(-1, 1, size[0]), np.linspace(-1, 1, size[1]))
    inside = (x - generator.uniform(-0.3, 0.3)) ** 2 + (y - generator.uniform(-0.3, 0.3)) ** 2 < 0.35
    pixels = 40 + 150 * inside[..., None] * [1.0, 0.7, 0.2] + generator.uniform(0, 25, (*inside.shape, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def varied(picture: Image.Image) -> bool:
    return np.array(picture.convert("RGB")).reshape(-1, 3).std(0).min() > 5


# --- the numbers ---


def test_most_of_a_map_is_the_smallest_set_that_holds_the_mass():
    generator = torch.Generator().manual_seed(0)
    for count, mass in [(9, 0.6), (9, 0.05), (12, 0.9), (12, 1.0)]:
        map_P = torch.rand(count, generator=generator) ** 3
        kept_P = most_of(map_P, mass)
        sums = [  # of every set there is
            (int(bits).bit_count(), sum(float(map_P[i]) for i in range(count) if bits >> i & 1))
            for bits in range(1 << count)
        ]
        goal = mass * float(map_P.double().sum())
        assert float(map_P[kept_P].double().sum()) >= goal - 1e-6
        assert int(kept_P.sum()) == min(size for size, total in sums if total >= goal - 1e-6)
        assert kept_P.all() or map_P[kept_P].min() >= map_P[~kept_P].max()
    assert most_of(torch.full((10,), 0.1), 0.6).sum() in (6, 7)  # of equal ones, but for rounding


def test_components_are_numpys():
    features_ND = torch.randn(50, 8, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 9)
    found = principal_components(features_ND, 3)
    centred = features_ND.double().numpy() - features_ND.double().numpy().mean(0)
    _, values, directions = np.linalg.svd(centred, full_matrices=False)
    for ours, theirs in zip(found.directions_KD.numpy(), directions, strict=False):
        theirs = theirs * np.sign(theirs[np.abs(theirs).argmax()])
        np.testing.assert_allclose(ours, theirs, atol=1e-9)
    np.testing.assert_allclose(found.share_K, (values**2 / (values**2).sum())[:3], atol=1e-12)
    np.testing.assert_allclose(found(features_ND), centred @ found.directions_KD.numpy().T, atol=1e-9)
    assert principal_components(torch.randn(5, 2), 3)(torch.randn(4, 2)).shape == (4, 3)
    assert principal_components(torch.ones(5, 4), 3)(torch.ones(5, 4)).abs().max() == 0


def test_split_in_two_is_otsus():
    generator = torch.Generator().manual_seed(0)
    for values_N in (
        torch.cat([torch.randn(30, generator=generator), 6 + torch.randn(20, generator=generator)]),
        torch.rand(17, generator=generator),
        torch.tensor([1.0, 1.0, 1.0, 4.0]),
    ):

        def within(threshold: float, values_N: Tensor = values_N) -> float:
            """What the best threshold makes smallest."""
            parts = values_N[values_N > threshold].double(), values_N[values_N <= threshold].double()
            return sum(float(((part - part.mean()) ** 2).sum()) for part in parts if len(part))

        assert within(split_in_two(values_N)) == pytest.approx(min(within(float(v)) for v in values_N), abs=1e-9)
    assert split_in_two(torch.ones(5)) == 1.0


def test_patch_components():
    """The same colours as from all patches at once by hand; the disc, which no border touches, is the foreground."""
    model, photos = model_of(size=70), [photo(1, (140, 105)), photo(2, (70, 70))]
    drawn = patch_components(model, photos)
    assert [colours.mask_HW.shape for _, colours in drawn] == [(10, 13), (10, 10)]
    tokens_ND = torch.cat([model.backbone(seen.input_1CHW).patches_NPD[0] for seen, _ in drawn])
    scores = np.linalg.svd(tokens_ND.double().numpy() - tokens_ND.double().numpy().mean(0), full_matrices=False)
    scores = scores[0][:, :3] * scores[1][:3]
    ours = np.concatenate([colours.all_HWC.reshape(-1, 3) for _, colours in drawn])
    for component in range(3):
        low, high = np.percentile(scores[:, component], (1, 99))
        theirs = np.clip((scores[:, component] - low) / (high - low), 0, 1)
        mirrored = np.abs(ours[:, component] - theirs).max() > 1e-4
        np.testing.assert_allclose(ours[:, component], 1 - theirs if mirrored else theirs, atol=1e-4)
    for seen, colours in drawn:
        disc = torch.nn.functional.adaptive_avg_pool2d(seen.image_CHW[:1].float(), colours.mask_HW.shape)[0] > 150
        shell = torch.nn.functional.adaptive_avg_pool2d(seen.image_CHW[:1].float(), colours.mask_HW.shape)[0] < 60
        assert colours.mask_HW[disc.numpy()].mean() > 0.9 and colours.mask_HW[shell.numpy()].mean() < 0.1
        assert (colours.foreground_HWC[~colours.mask_HW] == 0).all()
    again = patch_components(model, photos)
    assert all(np.array_equal(a.foreground_HWC, b.foreground_HWC) for (_, a), (_, b) in zip(drawn, again, strict=True))


def test_map_places():
    features_ND = torch.randn(40, 6, generator=torch.Generator().manual_seed(0)) + 2
    places_N2, axes_are = coordinates(features_ND, "pca")
    unit = F.normalize(features_ND).double().numpy()
    u, s, _ = np.linalg.svd(unit - unit.mean(0), full_matrices=False)
    np.testing.assert_allclose(np.abs(places_N2), np.abs(u[:, :2] * s[:2]), atol=1e-6)
    assert axes_are == f"PCA: {s[0] ** 2 / (s**2).sum():.0%} and {s[1] ** 2 / (s**2).sum():.0%} of the variance"
    assert torch.equal(coordinates(features_ND[:5], "auto")[0], coordinates(features_ND[:5], "pca")[0])
    with pytest.raises(UserError, match="more than 15 images"):
        coordinates(features_ND[:5], "umap")


def test_umap_is_the_same_every_time():
    pytest.importorskip("umap", reason="the extra `umap` is not installed")
    features_ND = torch.cat([torch.randn(20, 6), torch.randn(20, 6) + 9])
    places_N2, axes_are = coordinates(features_ND, "auto")
    assert axes_are == "UMAP" and places_N2.shape == (40, 2) and places_N2.isfinite().all()
    assert torch.equal(places_N2, coordinates(features_ND, "umap")[0])


def test_most_used_prototypes():
    torch.manual_seed(0)
    head, features_ND = ProjectionHead(12, prototypes=20, hidden=16, bottleneck=8), torch.randn(101, 12)
    found = most_used(head, features_ND, 4, 5, chunk=7)
    with torch.no_grad():
        logits_NK = head(features_ND)
    centred_NK = (logits_NK - logits_NK.mean(0)).numpy()
    uses = np.bincount(centred_NK.argmax(1), minlength=20)
    assert uses[found.prototypes_K].tolist() == sorted(uses, reverse=True)[:4]
    assert found.used == (uses > 0).sum()
    np.testing.assert_allclose(found.share_K, uses[found.prototypes_K] / 101)
    for prototype, images, scores in zip(found.prototypes_K, found.images_KN, found.scores_KN, strict=True):
        assert images.tolist() == np.argsort(-centred_NK[:, prototype])[:5].tolist()
        np.testing.assert_allclose(scores, centred_NK[images, prototype], atol=1e-6)
    with pytest.raises(UserError, match="does not fit features 11 wide"):
        most_used(head, features_ND[:, :11], 4, 5)


# --- the sheets ---


def test_size_of_what_is_seen():
    vit = model_of(size=28)
    assert seen_size(vit, 45, 60, None) == (28, 35)  # 37 is nearer to five patches than to six
    assert seen_size(vit, 60, 45, 70) == (91, 70)
    assert seen_size(vit, 10, 90, None) == (28, 56)  # at most 1 : 2
    assert seen_size(model_of("resnet10t", 64), 375, 500, None) == (64, 96)
    fixed = model_of(dynamic_img_size=False)
    assert seen_size(fixed, 45, 60, None) == (28, 28)
    for model, size, says in ((fixed, 56, "takes 28 x 28 pixels alone"), (vit, 3, "steps of 7 pixels")):
        with pytest.raises(UserError, match=says):
            seen_size(model, 45, 60, size)
    with pytest.raises(UserError, match="no patches"):
        seen_size(replace(vit, backbone=Pixels(3)), 45, 60, None)
    for grid in ((7, 7), (7, 10), (10, 7), (1, 1), (5, 9), (16, 24)):
        assert cells(grid[0] * grid[1], (grid[0] * 32, grid[1] * 32)) == grid


def test_attention_tiles_show_the_attention():
    model, picture = model_of(reg_tokens=2), photo()
    tiles = dict(attention_tiles(model, picture, size=None, mass=0.6, heads=True, layer=-1))
    assert list(tiles) == ["image", "60% of the mean", "mean of heads", "head 1", "head 2", "head 3"]
    shape = tiles["image"].pixels_HWC.shape
    assert {tile.pixels_HWC.shape for tile in tiles.values()} == {shape} and max(shape) <= SIDE
    map_hP = class_attention(model.backbone, see(model, picture).input_1CHW)[0]
    assert map_hP.shape == (3, 20)
    tall, wide = shape[0] // 4, shape[1] // 5
    for number, map_P in enumerate(map_hP, 1):
        inner = tiles[f"head {number}"].pixels_HWC[tall // 2 :: tall, wide // 2 :: wide].astype(int).sum(-1)
        assert inner.shape == (4, 5)
        order = map_P.argsort().numpy()
        assert (np.diff(inner.flatten()[order]) >= 0).all()  # the more, the lighter
    image, cut = tiles["image"].pixels_HWC, tiles["60% of the mean"].pixels_HWC
    same_HW = (image == cut).all(-1).reshape(4, tall, 5, wide).all((1, 3))
    assert np.array_equal(same_HW.flatten(), most_of(map_hP.mean(0), 0.6).numpy())


@pytest.mark.parametrize(
    ("channels", "pictures"),
    [
        (1, [photo(0, (28, 28)).convert("L"), photo(1, (28, 28)).convert("L")]),
        (3, [photo(0, (500, 375)), photo(1, (375, 500)).convert("L")]),
        (5, [torch.arange(8000).view(5, 40, 40).to(torch.uint16), torch.arange(7500).view(5, 50, 30) / 7500]),
    ],
)
def test_sheets_have_one_row_an_image_and_are_not_blank(channels: int, pictures: list):
    model = model_of(channels=channels)
    for draw, columns in ((attention_sheet, 6), (pca_sheet, 3)):
        one, both = draw(model, pictures[:1]), draw(model, pictures)
        assert both.height > 1.5 * one.height and columns * 56 < one.width <= columns * (SIDE + 8) + 8
        assert varied(one) and varied(both)
    assert attention_sheet(model, pictures, heads=False).width < attention_sheet(model, pictures).width
    large = attention_picture(model, pictures[0])
    assert large.height > attention_sheet(model, pictures[:1]).height and varied(large)
    rows = [[(picture, 0.5, "same"), (picture, 0.25, "")] for picture in pictures]
    sheet = neighbour_sheet(pictures, rows, ["same", "other"])
    assert 3 * 56 < sheet.width <= 3 * 120 + 8 and varied(sheet)
    found = {tuple(color) for color in np.array(sheet).reshape(-1, 3).tolist()}
    assert {(0, 114, 60), (190, 60, 0)} <= found  # a neighbour of the same label, and one of another


def test_pca_of_a_convnets_cells():
    model = model_of("resnet10t", 64)
    drawn = patch_components(model, [photo(0, (128, 96))], size=96)
    assert drawn[0][1].mask_HW.shape == (3, 4)
    assert patch_components(model, [photo()], size=96, layer=-2)[0][1].mask_HW.shape == (6, 8)
    assert varied(pca_sheet(model, [photo(0), photo(1)], size=96))
    with pytest.raises(UserError, match="is no plain ViT"):
        attention_sheet(model, [photo()])
    with pytest.raises(UserError, match="layer=9"):
        pca_sheet(model, [photo()], layer=9)


def test_a_table_puts_tiles_where_they_belong():
    red, blue = (np.full((20, 30, 3), color, dtype=np.uint8) for color in ((255, 0, 0), (0, 0, 255)))
    sheet = np.array(table([[Tile(red, "a" * 99), Tile(blue)], [Tile(blue)]], ["one", "two"], ["row 1", "row\n2"]))
    for color, places in (((255, 0, 0), 1), ((0, 0, 255), 2)):
        inside = (sheet == color).all(-1)
        assert inside.sum() == places * 20 * 30
    rows, columns = np.nonzero((sheet == (255, 0, 0)).all(-1))
    beside = (sheet[rows[0], columns.max() + 1 :] == (0, 0, 255)).all(-1)
    below = (sheet[rows.max() + 1 :, columns[0]] == (0, 0, 255)).all(-1)
    assert beside.sum() == 30 and below.sum() == 20


def test_images_for_the_eye_and_the_model():
    gray = photo().convert("L")
    assert np.array_equal(pixels_for_the_eye(as_image(gray)), np.array(gray.convert("RGB")))
    assert as_image(gray, 3).shape == (3, 45, 60) and as_image(photo(), 1).shape == (1, 45, 60)
    deep = Image.fromarray(np.arange(0, 6000, 100, dtype=np.uint16).reshape(6, 10))
    assert as_image(deep).dtype == torch.uint16
    shown = pixels_for_the_eye(as_image(deep))
    assert shown.min() == 0 and shown.max() == 255  # a sixteenth of the range is enough
    with pytest.raises(UserError, match=r"3 channel\(s\), the model takes 5"):
        see(model_of(channels=5), photo())
    model = model_of()
    expected = (np.array(photo(0, (28, 28))).transpose(2, 0, 1) / 255 - 0.5) / 0.25
    np.testing.assert_allclose(see(model, photo(0, (28, 28))).input_1CHW[0], expected, atol=1e-5)


@pytest.mark.parametrize("classes", [1, 3, 15, 40])
def test_a_map_of_any_number_of_classes(tmp_path: Path, classes: int):
    places_N2 = torch.randn(60, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels_N = torch.arange(60) % classes
    labels_N[::7] = -1
    pictures = [photo(i, (20, 15)) for i in range(60)] if classes == 3 else []
    figure = map_figure(places_N2, "$PCA", labels_N, None, "a $title", pictures)
    figure.savefig(tmp_path / "map.png")
    assert (figure.axes[0].get_legend() is not None) == (1 < classes <= 20)
    drawn = np.concatenate([points.get_offsets() for points in figure.axes[0].collections])  # pyright: ignore
    assert {tuple(place) for place in drawn} == {tuple(place) for place in places_N2.tolist()}
    assert varied(Image.open(tmp_path / "map.png"))


# --- the commands ---


def export(folder: Path, name: str, channels: int = 1, **args) -> Path:
    """A random model in timm's format."""
    model = model_of(name, channels=channels, **args)
    folder.mkdir()
    images = {"input_size": [channels, 28, 28], "mean": [0.3] * channels, "std": [0.3] * channels, "crop_pct": 1.0}
    args = {**SMALL, **args} if name.startswith("vit") else args
    (folder / "config.json").write_text(
        json.dumps({"architecture": name, "model_args": args, "pretrained_cfg": images})
    )
    save_file(model.backbone.model.state_dict(), folder / "model.safetensors")
    return folder


@pytest.fixture(scope="module")
def vit(tmp_path_factory) -> Path:
    return export(tmp_path_factory.mktemp("models") / "vit", "vit_tiny_patch16_224")


@pytest.fixture
def images(tmp_path: Path) -> Path:
    folder = tmp_path / "images"
    folder.mkdir()
    photo(0).save(folder / "one.png")
    photo(1).save(folder / "two.jpg")
    return folder


def test_attention_and_pca_of_two_images(vit: Path, images: Path, tmp_path: Path, monkeypatch, capsys):
    out = tmp_path / "out"
    (images / "three.png").write_text("no image")
    one = images / "one.png"
    code, said = run_cli(monkeypatch, capsys, "attention", vit, one, images, f"out={out}", "size=35", "device=cpu")
    assert code == 0 and "left out" in said and "three.png" in said
    code, _ = run_cli(monkeypatch, capsys, "pca", vit, images, f"out={out}", "device=cpu")
    assert code == 0
    written = {path.name: Image.open(path) for path in out.iterdir()}
    assert written.keys() == {
        "one_attention.png", "one_attention-2.png", "two_attention.png", "one_pca.png", "two_pca.png", "pca.png",
    }  # fmt: skip
    assert all(varied(picture) for picture in written.values())
    assert written["pca.png"].height > written["one_pca.png"].height / 2


def test_videos(vit: Path, tmp_path: Path, monkeypatch, capsys):
    frames = [photo(i, (40, 30)) for i in range(12)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=50)
    (tmp_path / "frames").mkdir()
    for number, frame in enumerate(frames):
        frame.save(tmp_path / "frames" / f"f{number}.png")  # f10 comes after f9
    arguments = ["attention", vit, tmp_path / "clip.gif", tmp_path / "frames", f"out={tmp_path}", "device=cpu"]
    code, said = run_cli(monkeypatch, capsys, *arguments, "frames=true", "heads=false", "every=3", "limit=3")
    assert code == 0 and "its first 9 of 12 frames" in said, said
    for name, fps in (("clip_attention.gif", 20 / 3), ("frames_attention.gif", 10 / 3)):
        clip = open_clip(tmp_path / name)
        pictures = list(clip.frames)
        assert clip.count == len(pictures) == 3 and clip.fps == pytest.approx(fps, rel=0.05)
        for shown, frame in zip(pictures, frames[::3], strict=False):
            assert isinstance(shown, Image.Image)
            expected = attention_picture(load_model(vit), frame, heads=False, side=240)
            assert shown.size == expected.size
            middle = (slice(20, 150), slice(20, 200), slice(0, 1))  # of the image, but for the 256 colours of a GIF
            far = np.abs(np.array(shown)[middle].astype(int) - np.array(expected)[middle].astype(int))
            assert far.mean() < 8


def test_mp4_needs_its_extra_or_works(vit: Path, tmp_path: Path, monkeypatch, capsys):
    frames = [photo(i, (40, 30)) for i in range(3)]
    frames[0].save(tmp_path / "clip.gif", save_all=True, append_images=frames[1:], duration=100)
    arguments = ["attention", vit, tmp_path / "clip.gif", f"out={tmp_path}", "format=mp4", "device=cpu"]
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "av", None)
        for changed in (arguments, ["attention", vit, tmp_path / "x.mp4"]):
            code, said = run_cli(monkeypatch, capsys, *changed)
            assert code == 2 and "pip install 'dino-sd[video]'" in said and len(said.splitlines()) == 1
    pytest.importorskip("av", reason="the extra `video` is not installed")
    assert run_cli(monkeypatch, capsys, *arguments)[0] == 0
    clip = open_clip(tmp_path / "clip_attention.mp4")
    assert len(list(clip.frames)) == 3 and clip.fps == pytest.approx(10)
    (tmp_path / "junk.mp4").write_text("no video")
    code, said = run_cli(monkeypatch, capsys, "attention", vit, tmp_path / "junk.mp4", "device=cpu")
    assert code == 2 and "cannot be read as a video" in said


def test_a_thinned_clip():
    clip = Clip([Image.new("L", (1, 1), i) for i in range(10)], 10, 30.0)
    for every, most, kept in ((1, 0, list(range(10))), (3, 0, [0, 3, 6, 9]), (3, 2, [0, 3]), (4, 5, [0, 4, 8])):
        thin = clip.thinned(every, most)
        assert [frame.getpixel((0, 0)) for frame in thin.frames] == kept  # pyright: ignore
        assert thin.count == len(kept) and thin.fps == 30 / every


def test_neighbours_are_the_nearest(vit: Path, tmp_path: Path, monkeypatch):
    shown: list = []
    monkeypatch.setattr(gallery, "neighbour_sheet", lambda *arguments: (shown.extend(arguments), photo())[1])
    out, source, model = tmp_path / "n.png", open_source(MINI, 1), load_model(vit)
    chosen = np.linspace(0, len(source) - 1, 200).round().astype(int)
    wanted = chosen[[2, 50]].tolist()
    settings = NeighboursSettings(out=str(out), images=wanted, k=4, limit=200, device="cpu", workers=0)
    assert gallery.neighbours(vit, MINI, settings) == out and out.exists()
    queries, rows, names = shown
    assert all(torch.equal(query, source.image(i)) for query, i in zip(queries, wanted, strict=True))
    features_ND, labels_N = embed(
        model.backbone, source, size=(28, 28), crop=1.0, mean=model.mean, std=model.std, device="cpu"
    )
    unit_ND = F.normalize(features_ND[torch.from_numpy(chosen)]).double()
    assert source.classes is not None
    for place, row, name in zip((2, 50), rows, names, strict=True):
        similarity_N = unit_ND @ unit_ND[place]
        similarity_N[place] = -2
        best = similarity_N.argsort(descending=True)[:4]
        assert [label for _, _, label in row] == [source.classes[labels_N[chosen[i]]] for i in best.tolist()]
        np.testing.assert_allclose([s for _, s, _ in row], similarity_N[best], atol=1e-5)
        assert all(
            torch.equal(image, source.image(chosen[i])) for (image, _, _), i in zip(row, best.tolist(), strict=True)
        )
        assert name == source.classes[labels_N[chosen[place]]]


def test_bad_images_do_not_shift_the_others(vit: Path, images: Path, tmp_path: Path, monkeypatch, capsys):
    (images / "a.png").write_text("no image")
    for number in range(3):
        photo(number).save(images / f"x{number}.png")
    names: list[list[str]] = []
    draw = gallery.neighbour_sheet
    monkeypatch.setattr(gallery, "neighbour_sheet", lambda *args: (names.append(args[2]), draw(*args))[1])
    out = tmp_path / "n.png"
    code, said = run_cli(monkeypatch, capsys, "neighbours", vit, images, f"out={out}", "count=9", "device=cpu")
    assert code == 0 and varied(Image.open(out)), said
    assert names == [["one.png", "two.jpg", "x0.png", "x1.png", "x2.png"]]
    code, said = run_cli(monkeypatch, capsys, "neighbours", vit, images, "images=[0]", "device=cpu")
    assert code == 2 and "images=0: cannot be read" in said


def test_map_writes_a_picture_and_places(vit: Path, tmp_path: Path, monkeypatch, capsys):
    out, places = tmp_path / "map.png", tmp_path / "deep" / "map.csv"
    same = [vit, MINI, f"out={out}", "method=pca", "limit=30", "device=cpu", "workers=0"]
    code, said = run_cli(monkeypatch, capsys, "map", *same, f"coordinates={places}")
    assert code == 0 and varied(Image.open(out)), said
    with places.open() as file:
        rows = list(csv.DictReader(file))
    source = open_source(MINI, 1)
    labels_N = source.labels()
    assert len(rows) == 30 and rows[-1]["index"] == str(len(source) - 1) and labels_N is not None and source.classes
    assert [row["label"] for row in rows] == [source.classes[labels_N[int(row["index"])]] for row in rows]
    assert run_cli(monkeypatch, capsys, "map", *same, f"coordinates={tmp_path / 'map.json'}")[0] == 0
    again = json.loads((tmp_path / "map.json").read_text())
    assert [str(row["x"]) for row in again] == [row["x"] for row in rows]
    code, said = run_cli(monkeypatch, capsys, "map", *same, "coordinates=map.txt")
    assert code == 2 and "coordinates=map.txt" in said
    monkeypatch.setitem(sys.modules, "umap", None)
    code, said = run_cli(monkeypatch, capsys, "map", *same, "method=umap")
    assert code == 2 and "pip install 'dino-sd[umap]'" in said


def test_prototypes_need_a_head(vit: Path, tmp_path: Path, monkeypatch, capsys):
    code, said = run_cli(monkeypatch, capsys, "prototypes", vit, MINI, "device=cpu")
    assert code == 2 and "has no prototypes" in said and len(said.splitlines()) == 1
    torch.manual_seed(0)
    head = ProjectionHead(24, prototypes=12, hidden=16, bottleneck=8)
    model = replace(load_model(vit), projection=head)
    monkeypatch.setattr(gallery, "prepare", lambda *arguments: model)
    out = tmp_path / "p.png"
    settings = PrototypesSettings(out=str(out), count=3, images=4, limit=60, device="cpu", workers=0)
    assert gallery.prototypes(vit, MINI, settings) == out
    sheet = Image.open(out)
    assert varied(sheet) and 4 * 120 < sheet.width < 7 * 120 and 3 * 112 < sheet.height < 3 * 160


@pytest.mark.parametrize(
    ("command", "changes", "words"),
    [
        ("attention", ["CONVNET", "IMAGES"], ["is no plain ViT", "use pca"]),
        ("attention", ["pixels", "IMAGES"], ["no patches"]),
        ("pca", ["pixels", "IMAGES"], ["no patches"]),
        ("attention", ["VIT", "TEXT"], ["no image"]),
        ("attention", ["VIT", "FAKE"], ["cannot be read as an image"]),
        ("pca", ["VIT", "FAKE"], ["cannot be read as an image"]),
        ("attention", ["VIT", "/no/such"], ["does not exist"]),
        ("attention", ["VIT", "size=35"], ["one IMAGE or more"]),
        ("attention", ["VIT", "IMAGES", "layer=2"], ["layer=2", "2 blocks, 0 to 1"]),
        ("attention", ["VIT", "IMAGES", "mass=1.5"], ["mass=1.5"]),
        ("attention", ["VIT", "IMAGES", "head=1"], ["'head'", "'heads'"]),
        ("attention", ["VIT", "IMAGES", "out=FAKE"], ["out=", "cannot be written"]),
        ("pca", ["VIT", "IMAGES", "size=3"], ["size=3", "7 pixels"]),
        ("neighbours", ["VIT", MINI, "images=[99999]"], ["images=99999", "not among 0 to"]),
        ("map", ["VIT", MINI, "out=map.nothing", "limit=5"], ["map.nothing", "such as map.png"]),
    ],
)
def test_bad_input(vit: Path, images: Path, tmp_path: Path, monkeypatch, capsys, command, changes, words):
    (tmp_path / "a.txt").write_text("a list without images")
    (tmp_path / "fake.png").write_text("no image")
    places = {"VIT": vit, "IMAGES": images, "TEXT": tmp_path / "a.md", "FAKE": tmp_path / "fake.png"}
    (tmp_path / "a.md").write_text("# text")
    if "CONVNET" in changes:
        places["CONVNET"] = export(tmp_path / "convnet", "resnet10t")
    given = [str(places.get(word, word)).replace("out=FAKE", f"out={tmp_path / 'fake.png'}") for word in changes]
    defaults = ["device=cpu"] if len(given) > 1 and "=" not in given[1] else []
    out = [] if any(word.startswith("out=") for word in given) else [f"out={tmp_path / 'out.png'}"]
    code, said = run_cli(monkeypatch, capsys, command, *given, *defaults, *(out if defaults else []))
    assert code == 2, said
    for word in words:
        assert word in said, said
    assert len(said.strip().splitlines()) == 1 and "Traceback" not in said
