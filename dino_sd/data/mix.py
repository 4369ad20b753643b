"""MixUp (Zhang et al. 2018) and CutMix (Yun et al. 2019): images and labels of a batch mixed with their neighbours'."""

import torch

from dino_sd.errors import UserError
from dino_sd.shapes import NO_LABEL


class Mix:
    """Mixes every batch, by torchvision's MixUp or CutMix.

    mixup, cutmix: alpha of the Beta(alpha, alpha) that the share of an image is drawn from; 0 turns one off. With both
    on, each batch gets one or the other, with equal chance. classes: how many there are.
    """

    def __init__(self, mixup: float, cutmix: float, classes: int):
        from torchvision.transforms.v2 import CutMix, MixUp  # costs a second, which most runs need not spend

        self._classes = classes
        self._kinds = [kind(alpha=a, num_classes=classes) for kind, a in ((MixUp, mixup), (CutMix, cutmix)) if a]

    def __call__(self, images_BCHW: torch.Tensor, labels_B: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """The mixed images, and float labels (B, classes) on the same device, whose rows sum to 1.

        images_BCHW: float, on any device. labels_B: int64, best on the CPU: they are looked at. Random numbers come
        from torch's global CPU generator. Raises UserError where an image has no label.
        """
        if missing := int((labels_B == NO_LABEL).sum()):
            raise UserError(
                f"mix: {missing} of {len(labels_B)} images have no label, but mixing needs one for every image; "
                "turn mixup and cutmix off, or train on labelled images alone"
            )
        one_hot_BC = torch.nn.functional.one_hot(labels_B, self._classes).float()
        labels_BC = one_hot_BC.to(images_BCHW.device, non_blocking=True)
        if not self._kinds:
            return images_BCHW, labels_BC
        chosen = int(torch.randint(len(self._kinds), ())) if len(self._kinds) > 1 else 0
        return self._kinds[chosen](images_BCHW, labels_BC)
