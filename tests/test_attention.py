"""Attention out of fused kernels: the laws of a softmax, the kernel's own output, and the published numbers."""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dino_sd.errors import UserError
from dino_sd.models.attention import attended, attention, class_attention
from dino_sd.models.backbone import Backbone
from dino_sd.models.pixels import Pixels
from dino_sd.models.weights import load_into

REFERENCE = Path(os.environ.get("DINO_SD_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
SMALL = {"patch_size": 8, "embed_dim": 24, "depth": 3, "num_heads": 3}


def backbone(name: str = "vit_tiny_patch16_224", **args) -> Backbone:
    torch.manual_seed(0)
    made = Backbone(name, size=(32, 32), model_args={**SMALL, **args}).eval()
    for parameter in made.parameters():  # attention that is far from uniform, norms and biases that do something
        parameter.data.add_(torch.randn_like(parameter) * 0.3)
    return made


KINDS = {
    "plain": {},
    "registers": {"reg_tokens": 4},
    "normed queries and keys": {"qk_norm": True},
    "no bias": {"qkv_bias": False},
    "layer scale, no class token's position": {"init_values": 0.1, "no_embed_class": True},
}
IMAGES = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("layer", [0, 1, -1])
@pytest.mark.parametrize("kind", KINDS)
def test_rows_sum_to_one_and_give_the_fused_kernels_output(kind: str, layer: int, fused: bool):
    model = backbone(**KINDS[kind])
    model.use_fused_attention(fused)
    seen = attended(model, IMAGES, layer)
    tokens = 16 + model.prefix_tokens
    assert model.prefix_tokens == (5 if kind == "registers" else 1)
    assert seen.weights.shape == (2, 3, tokens, tokens)
    assert (seen.weights.sum(-1) - 1).abs().max() < 1e-5
    assert seen.weights.std() > 0.01
    assert (seen.weights @ seen.values - seen.mixed).abs().max() < 1e-5
    # ... and that is what the block goes on with: heads side by side, projected
    attn, taken = model.model.blocks[layer].attn, {}
    handle = attn.register_forward_hook(lambda module, args, output: taken.update(x=args[0], y=output))
    with torch.no_grad():
        model.model.forward_features(IMAGES)
        handle.remove()
        ours = attn.proj((seen.weights @ seen.values).transpose(1, 2).flatten(2))
    assert (ours - taken["y"]).abs().max() < 1e-5
    assert torch.allclose(seen.weights, by_hand(attn, taken["x"]), atol=1e-5, rtol=0)


def by_hand(attn, x_NPD: Tensor) -> Tensor:
    """One image, head and token after the other."""
    images, tokens, _ = x_NPD.shape
    wide = attn.head_dim
    weights = torch.zeros(images, attn.num_heads, tokens, tokens)
    with torch.no_grad():
        projected = attn.qkv(x_NPD)
        for image in range(images):
            for head in range(attn.num_heads):
                q = attn.q_norm(projected[image, :, head * wide : (head + 1) * wide])
                start = attn.num_heads * wide + head * wide
                k = attn.k_norm(projected[image, :, start : start + wide])
                for token in range(tokens):
                    powers = torch.stack([(q[token] * other).sum() / wide**0.5 for other in k]).exp()
                    weights[image, head, token] = powers / powers.sum()
    return weights


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("vit_small_patch16_dinov3", {"embed_dim": 24, "num_heads": 3, "depth": 2, "patch_size": 8}),
        ("vit_small_patch16_rope_224", {"embed_dim": 24, "num_heads": 3, "depth": 2, "patch_size": 8}),
        ("beit_base_patch16_224", {"embed_dim": 24, "num_heads": 3, "depth": 2, "patch_size": 8}),
    ],
)
def test_other_kinds_that_end_in_the_fused_kernel(name: str, args: dict):
    """Rotary and relative positions: nothing is known of them here, the block's own code works them out."""
    torch.manual_seed(0)
    model = Backbone(name, size=(32, 32), model_args=args).eval()
    seen = attended(model, IMAGES)
    assert (seen.weights.sum(-1) - 1).abs().max() < 1e-5
    assert (seen.weights @ seen.values - seen.mixed).abs().max() < 1e-5
    assert class_attention(model, IMAGES).shape == (2, 3, 16)


def test_the_class_tokens_row_without_registers():
    model = backbone(reg_tokens=4)
    whole = attention(model, IMAGES)
    assert torch.allclose(class_attention(model, IMAGES), whole[:, :, 0, 5:], atol=1e-6, rtol=0)
    larger = torch.randn(1, 3, 48, 64)
    assert class_attention(model, larger, 1).shape == (1, 3, 48)


def test_the_model_stays_as_it_was():
    model = backbone()
    model.use_fused_attention(False)
    before, state = model(IMAGES).pooled_ND, {key: value.clone() for key, value in model.state_dict().items()}
    own = {name: dict(vars(module)) for name, module in model.named_modules()}
    attention(model, IMAGES)
    with pytest.raises(RuntimeError):
        attention(model, torch.randn(1, 5, 32, 32))  # also where it fails on the way
    assert torch.equal(model(IMAGES).pooled_ND, before)
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    for name, module in model.named_modules():
        assert not module._forward_pre_hooks and not module._forward_hooks
        assert own[name].keys() == vars(module).keys() and getattr(module, "fused_attn", False) is False


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("resnet10t", {}, "is no plain ViT"),
        ("pixels", {}, "is no plain ViT"),
        ("xcit_nano_12_p16_224", {"embed_dim": 24, "num_heads": 3, "depth": 1}, "in a way of its own"),
        ("cait_xxs24_224", {"embed_dim": 24, "num_heads": 3, "depth": 1}, "not known here"),
    ],
)
def test_others_are_refused(name: str, args: dict, says: str):
    model = Pixels(3) if name == "pixels" else Backbone(name, size=(32, 32), model_args=args).eval()
    with pytest.raises(UserError, match=says):
        attention(model, IMAGES)
    with pytest.raises(UserError, match=says):
        class_attention(model, IMAGES)


def test_wrong_layers_and_no_class_token():
    with pytest.raises(UserError, match="has 3 blocks, 0 to 2"):
        attention(backbone(), IMAGES, 3)
    model = backbone(class_token=False, global_pool="avg")
    assert attention(model, IMAGES).shape == (2, 3, 16, 16)
    with pytest.raises(UserError, match="no class token"):
        class_attention(model, IMAGES)


@pytest.mark.skipif(not REFERENCE.is_dir(), reason=f"no reference numbers at {REFERENCE} (DINO_SD_REFERENCE)")
def test_published_attention():
    """`attention224`: image, head, patch of the last block, from the authors' own code."""
    with torch.serialization.safe_globals([argparse.Namespace]):
        teacher = torch.load(REFERENCE / "published_checkpoint.pth", "cpu", weights_only=True)["teacher"]
    state = {key: value for key, value in teacher.items() if not key.startswith(("head.", "module.head."))}
    args = {"embed_dim": 64, "depth": 4, "num_heads": 2}
    model = Backbone("vit_tiny_patch16_224", size=(224, 224), model_args=args).eval()
    load_into(model, state)
    with np.load(REFERENCE / "published_expected.npz", allow_pickle=False) as file:
        images, theirs = torch.from_numpy(file["x224"]).float(), torch.from_numpy(file["attention224"])
    ours = class_attention(model, images)
    assert ours.shape == theirs.shape
    assert (ours - theirs).abs().max() < 1e-5
