"""Raw pixels in the place of a backbone: the baseline that features have to beat."""

from collections.abc import Sequence

from torch import Tensor, nn

from dino_sd.models.backbone import Features


class Pixels(nn.Module):
    """Answers as `Backbone` does; the features of an image are its pixels."""

    name, width, depth, blocks_have_class_token, patch_size, registers = "pixels", 0, 1, False, None, 0

    def __init__(self, channels: int):
        super().__init__()
        self.channels = channels

    def forward(self, images_NCHW: Tensor, layers: Sequence[int] = ()) -> Features:
        """pooled_ND: C * H * W values of each image; patches_NPD: its pixels, C values each."""
        return Features(images_NCHW.flatten(1), images_NCHW.flatten(2).transpose(1, 2), [])

    def tokens(
        self, images_NCHW: Tensor, layers: Sequence[int] | None = None, kind: str = "cls", norm: bool = True
    ) -> list[Tensor]:
        """As `Backbone.tokens`: the one layer that there is are the pixels."""
        return [images_NCHW.flatten(1) if kind == "cls" else images_NCHW] * len(layers or [0])
