"""Self-distillation for vision: pretrain backbones on your own images, judge them, take them elsewhere."""

__version__ = "0.1.0"
