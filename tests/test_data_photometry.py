"""Stage two equals torchvision's and Pillow's operations, one crop at a time."""

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as TF
from PIL import Image, ImageFilter

from dino_sd.data import photometry
from dino_sd.data.photometry import Photometry, gaussian_blur
from dino_sd.data.views import Row, ViewGroup, ViewSpec

OPERATIONS = {
    Row.BRIGHTNESS: TF.adjust_brightness,
    Row.CONTRAST: TF.adjust_contrast,
    Row.SATURATION: TF.adjust_saturation,
    Row.HUE: TF.adjust_hue,
}


def spec(channels=3):
    return ViewSpec((ViewGroup(1, (20, 24), (0.4, 1.0)),), channels=channels)


def smooth_crops(count, channels=3, size=(20, 24), seed=0):
    """Colourful crops with flat, black, white and gray parts."""
    generator = torch.Generator().manual_seed(seed)
    crops = torch.rand(count, channels, 5, 6, generator=generator) * 1.4 - 0.2
    crops = torch.nn.functional.interpolate(crops, size, mode="bilinear").clamp(0, 1)
    crops[:, :, :3] = crops[:, :1, :3]
    return (crops * 255).round().to(torch.uint8)


def neutral_rows(count):
    rows = torch.zeros(count, len(Row))
    rows[:, : Row.HUE] = 1
    rows[:, Row.FIRST : Row.FOURTH + 1] = torch.arange(4)
    return rows


def augment(crops, rows, channels=3):
    return Photometry(spec(channels), [0.0] * channels, [1.0] * channels)(crops, rows)


def test_neutral_rows_only_normalise():
    crops = smooth_crops(3)
    mean, std = [0.4, 0.5, 0.6], [0.2, 0.3, 0.25]
    expected = TF.normalize(crops / 255, mean, std)
    result = Photometry(spec(), mean, std)(crops, neutral_rows(3))
    assert result.dtype == torch.float32 and torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("column", "value"),
    [(column, value) for column in (Row.BRIGHTNESS, Row.CONTRAST, Row.SATURATION) for value in (0.0, 0.2, 0.7, 3.0)]
    + [(Row.HUE, value) for value in (-0.5, -0.31, -0.08, 0.05, 0.2, 0.5)],
)
def test_each_jitter_operation_equals_torchvision(column, value):
    crops, rows = smooth_crops(4), neutral_rows(4)
    rows[:, column] = value
    assert torch.allclose(augment(crops, rows), OPERATIONS[column](crops / 255, value), atol=2e-4)


def random_rows(count, channels=3):
    generator = torch.Generator().manual_seed(1)
    rows = neutral_rows(count)
    rows[:, :3] = 0.6 + 0.8 * torch.rand(count, 3, generator=generator)
    rows[:, Row.HUE] = 0.2 * torch.rand(count, generator=generator) - 0.1
    rows[::3, : Row.HUE + 1] = torch.tensor([1.0, 1.0, 1.0, 0.0])
    for row in rows:
        row[Row.FIRST : Row.FOURTH + 1] = torch.randperm(4, generator=generator)
    rows[::4, Row.GRAYSCALE] = 1
    rows[::5, Row.SOLARIZE] = 1
    rows[::2, Row.SIGMA] = 0.1 + 1.9 * torch.rand(len(rows[::2]), generator=generator)
    if channels != 3:
        rows[:, Row.SATURATION], rows[:, Row.HUE], rows[:, Row.GRAYSCALE] = 1, 0, 0
    return rows


def test_everything_together_equals_torchvision_crop_by_crop(monkeypatch):
    crops, rows = smooth_crops(24), random_rows(24)
    result = augment(crops, rows)
    for crop, row, mine in zip(crops, rows.tolist(), result, strict=True):
        x = crop / 255
        for column in row[Row.FIRST : Row.FOURTH + 1]:
            x = OPERATIONS[Row(int(column))](x, row[int(column)])
        if row[Row.GRAYSCALE]:
            x = TF.rgb_to_grayscale(x, 3)
        if row[Row.SIGMA]:
            # torchvision reflects at the edges; a replicated margin keeps them out of the picture.
            x = torch.nn.functional.pad(x[None], (9,) * 4, mode="replicate")[0]
            x = TF.gaussian_blur(x, [17, 17], [row[Row.SIGMA]] * 2)[:, 9:-9, 9:-9]
        if row[Row.SOLARIZE]:
            x = TF.solarize(x, 127.5 / 255)
        # luma weights differ in the fourth digit, which solarising may turn into a jump at the threshold
        assert ((mine - x).abs() < 1e-3).float().mean() > 0.995
    # How crops are cut into chunks changes nothing that matters.
    monkeypatch.setattr(photometry, "_CHUNK_CPU", 1)
    assert torch.allclose(augment(crops, rows), result, atol=1e-6)


@pytest.mark.parametrize("channels", [1, 4])
def test_other_numbers_of_channels(channels):
    crops, rows = smooth_crops(12, channels), random_rows(12, channels)
    result = augment(crops, rows, channels)
    for crop, row, mine in zip(crops, rows.tolist(), result, strict=True):
        x = crop / 255
        for column in row[Row.FIRST : Row.FOURTH + 1]:
            if column == Row.BRIGHTNESS:
                x = (row[Row.BRIGHTNESS] * x).clamp(0, 1)
            elif column == Row.CONTRAST:
                x = (row[Row.CONTRAST] * x + (1 - row[Row.CONTRAST]) * x.mean()).clamp(0, 1)
        if row[Row.SIGMA]:
            x = gaussian_blur(x[None], torch.tensor([row[Row.SIGMA]]), 8)[0]
        if row[Row.SOLARIZE]:
            x = torch.where(x >= 0.5, 1 - x, x)
        assert torch.allclose(mine, x, atol=1e-5)


def test_solarize_has_pillows_threshold():
    ramp = torch.arange(256, dtype=torch.uint8).repeat(3, 1).view(1, 3, 16, 16)
    rows = neutral_rows(1)
    rows[:, Row.SOLARIZE] = 1
    expected = [value if value < 128 else 255 - value for value in range(256)]
    assert (augment(ramp, rows)[0, 0].flatten() * 255).round().int().tolist() == expected


@pytest.mark.parametrize("sigma", [0.1, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("size", [(20, 24), (14, 14), (96, 96), (70, 101), (3, 5)])
def test_blur_is_a_gaussian_with_replicated_edges(sigma, size):
    images = smooth_crops(2, size=size) / 255
    margin = torch.nn.functional.pad(images, (8,) * 4, mode="replicate")
    expected = TF.gaussian_blur(torch.nn.functional.pad(margin, (8,) * 4), [17, 17], [sigma] * 2)
    expected = expected[..., 16:-16, 16:-16]
    mine = gaussian_blur(images, torch.full((2,), sigma), 8)
    assert torch.allclose(mine, expected, atol=1e-5)


@pytest.mark.parametrize("sigma", [0.5, 1.0, 2.0])
def test_blur_is_near_pillows(sigma):
    # Pillow's own is three box blurs: near a Gaussian, not one.
    noise = torch.randint(0, 256, (1, 3, 64, 64), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    mine = gaussian_blur(noise / 255, torch.tensor([sigma]), 8)[0].permute(1, 2, 0).numpy() * 255
    image = Image.fromarray(noise[0].permute(1, 2, 0).numpy())
    theirs = np.asarray(image.filter(ImageFilter.GaussianBlur(sigma))).astype(float)
    assert np.abs(mine - theirs).mean() < 3 and abs(mine.std() - theirs.std()) < 0.08 * theirs.std()


def test_an_empty_batch_and_wrong_statistics():
    assert augment(torch.empty(0, 3, 20, 24, dtype=torch.uint8), neutral_rows(0)).shape == (0, 3, 20, 24)
    with pytest.raises(ValueError, match="expected 3 numbers"):
        Photometry(spec(), [0.5], [0.5])


def test_autocast_does_not_reach_the_pixels():
    crops, rows = smooth_crops(6), random_rows(6)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(augment(crops, rows), augment(crops, rows).float())
        inside = augment(crops, rows)
    assert torch.equal(inside, augment(crops, rows))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_gpu_equals_cpu():
    crops, rows = smooth_crops(24), random_rows(24)
    on_gpu = augment(crops.cuda(), rows).cpu()
    assert ((on_gpu - augment(crops, rows)).abs() < 2e-3).float().mean() > 0.999


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_host_never_waits_for_the_gpu():
    crops, rows, augmentation = smooth_crops(24).cuda(), random_rows(24), Photometry(spec(), [0.0] * 3, [1.0] * 3)
    augmentation(crops, rows)
    torch.cuda.set_sync_debug_mode("error")
    try:
        augmentation(crops, rows)
    finally:
        torch.cuda.set_sync_debug_mode("default")
