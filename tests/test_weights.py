import os
import pickle

import pytest
import torch
from safetensors.torch import save_file

from dino_sd.errors import UserError
from dino_sd.models.backbone import Backbone, pretrained_cfg
from dino_sd.models.weights import load_into, read_weights, start_from

TINY = {"patch_size": 7, "embed_dim": 32, "depth": 2, "num_heads": 2}


def vit(size=28, channels=1, name="vit_tiny_patch16_224", **model_args):
    return Backbone(name, size=(size, size), channels=channels, model_args=TINY | model_args)


def weights(backbone):
    return {key: value.clone() for key, value in backbone.model.state_dict().items()}


def refusal(backbone, state) -> str:
    before = weights(backbone)
    with pytest.raises(UserError) as error:
        load_into(backbone, state)
    after = backbone.model.state_dict()
    assert all(torch.equal(before[key], after[key]) for key in before), "half loaded"
    return str(error.value)


@pytest.mark.parametrize("suffix", [".pt", ".pth", ".safetensors"])
@pytest.mark.parametrize(
    "prefix",
    ["", "module.", "_orig_mod.", "module.backbone.model.", "backbone._orig_mod.model.", "backbone.module.model."],
)
def test_wrappers_come_off(tmp_path, suffix, prefix):
    source, target = vit(), vit()
    state = {prefix + key: value for key, value in weights(source).items()}
    if "backbone." in prefix:
        state[prefix.partition("backbone.")[0] + "heads.dino.last.weight"] = torch.zeros(3)
    path = tmp_path / f"weights{suffix}"
    if suffix == ".safetensors":
        save_file(state, path)
    else:
        torch.save({"state_dict": state} if suffix == ".pth" else state, path)
    assert load_into(target, read_weights(path)) == []
    images = torch.randn(2, 1, 28, 28)
    assert torch.equal(source.eval()(images).pooled_ND, target.eval()(images).pooled_ND)


def test_missing_extra_and_renamed_keys_are_named():
    state = weights(vit())
    del state["blocks.1.attn.qkv.weight"]
    assert "missing blocks.1.attn.qkv.weight" in refusal(vit(), state)
    assert "unexpected surplus" in refusal(vit(), weights(vit()) | {"surplus": torch.zeros(1)})
    renamed = {key.replace("blocks.", "layers."): value for key, value in weights(vit()).items()}
    message = refusal(vit(), renamed)
    assert "0 blocks" in message and "missing blocks.0.norm1.weight" in message and "unexpected layers.0." in message
    foreign = {f"x.{key}": value for key, value in weights(vit()).items()}
    assert "almost none" in refusal(vit(), foreign)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        ({"patch_size": 14, "size": 56}, ["patch size 14", "has 7", "32x1x14x14"]),
        ({"channels": 3}, ["3 channel", "channels=3"]),
        ({"depth": 3}, ["3 blocks", "has 2"]),
        ({"embed_dim": 64}, ["another width", "cls_token is 1x1x64, expected 1x1x32"]),
        ({"reg_tokens": 4}, ["4 register token(s), the model has 0", "unexpected reg_token"]),
    ],
)
def test_the_likely_reason_is_given(other, words):
    message = refusal(vit(), weights(vit(**other)))
    assert all(word in message for word in ["vit_tiny_patch16_224", *words]), message


def test_registers_wanted_but_not_there():
    message = refusal(vit(reg_tokens=4), weights(vit()))
    assert "0 register token(s), the model has 4" in message and "missing reg_token" in message


def test_other_architecture():
    resnet = Backbone("resnet18", size=(28, 28), channels=1)
    assert "another architecture" in refusal(vit(), weights(resnet))


@pytest.mark.parametrize("reg_tokens", [0, 4])
def test_position_embedding_is_resized_and_said(reg_tokens):
    source = vit(reg_tokens=reg_tokens)
    target = vit(size=56, reg_tokens=reg_tokens)
    assert load_into(target, weights(source)) == ["resized the position embedding from 4x4 to 8x8 patches"]
    images = torch.randn(2, 1, 56, 56)
    torch.testing.assert_close(source.eval()(images).pooled_ND, target.eval()(images).pooled_ND)


def test_classifier_is_left_out_and_said():
    notes = load_into(vit(), weights(vit()) | {"head.weight": torch.zeros(10, 32), "head.bias": torch.zeros(10)})
    assert len(notes) == 1 and "classifier" in notes[0]


def test_broken_numbers_are_refused():
    state = weights(vit())
    state["norm.weight"][3] = torch.nan
    assert "NaN" in refusal(vit(), state) and "norm.weight" in refusal(vit(), state)


class Malicious:
    def __reduce__(self):
        return (exec, ("import os; os.environ['DINO_SD_TEST_RAN'] = '1'",))


@pytest.mark.parametrize("with_torch", [True, False])
def test_a_pickle_that_would_run_code_is_refused(tmp_path, with_torch, monkeypatch):
    monkeypatch.delenv("DINO_SD_TEST_RAN", raising=False)
    path = tmp_path / "weights.pth"
    if with_torch:
        torch.save({"state_dict": weights(vit()), "args": Malicious()}, path)
    else:
        path.write_bytes(pickle.dumps(Malicious(), protocol=2))
    with pytest.raises(UserError, match="could run code"):
        read_weights(path)
    assert "DINO_SD_TEST_RAN" not in os.environ


def test_files_that_hold_no_weights(tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        read_weights(tmp_path / "none.pth")
    for name in ("cut.pth", "cut.safetensors"):
        (tmp_path / name).write_bytes(b"PK\x03\x04 not the rest")
        with pytest.raises(UserError, match="cannot be read|could run code"):
            read_weights(tmp_path / name)
    torch.save({"epoch": 3, "lr": 0.1}, tmp_path / "other.pth")
    with pytest.raises(UserError, match="epoch, lr"):
        read_weights(tmp_path / "other.pth")
    torch.save([1, 2], tmp_path / "list.pth")
    with pytest.raises(UserError, match="a list"):
        read_weights(tmp_path / "list.pth")


def test_published_files_hold_a_namespace_and_nothing_else_is_allowed(tmp_path):
    import argparse
    import os

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    weights = {"module.a": torch.ones(2)}
    torch.save(
        {"state_dict": weights, "args": argparse.Namespace(lr=0.1, arch="vit_small")}, tmp_path / "published.pth"
    )
    assert read_weights(tmp_path / "published.pth")["a"].tolist() == [1, 1]
    for name, arguments in (("evil", Evil()), ("inside", argparse.Namespace(x=Evil()))):
        torch.save({"state_dict": weights, "args": arguments}, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match="could run code, so it is not opened"):
            read_weights(tmp_path / f"{name}.pth")
    assert not (tmp_path / "ran").exists()


def test_other_heads_are_refused_and_grids_resized():
    """What no weight's shape tells: 64 positions may be 8 x 8 or 4 x 16."""

    def made(size: tuple[int, int], heads: int) -> Backbone:
        args = {"patch_size": 4, "embed_dim": 32, "depth": 1, "num_heads": heads}
        return Backbone("vit_tiny_patch16_224", size=size, channels=1, model_args=args)

    wide, square = made((16, 64), 2), made((32, 32), 2)
    assert wide.model.pos_embed.shape == square.model.pos_embed.shape
    assert start_from(square, wide, "init") == ["resized the position embedding from 4x16 to 8x8 patches"]
    assert not torch.equal(square.model.pos_embed, wide.model.pos_embed)
    again = made((16, 64), 2)
    assert start_from(again, wide, "init") == [] and torch.equal(again.model.pos_embed, wide.model.pos_embed)
    with pytest.raises(UserError, match="has 2 attention heads a block, model=.* has 4.*num_heads: 2"):
        start_from(made((16, 64), 4), wide, "init")


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "ghostnet_050", "resnet18", "xcit_nano_12_p16_224"])
def test_a_backbone_is_as_wide_as_it_says(name: str):
    backbone = Backbone(name, size=(64, 64)).eval()
    with torch.no_grad():
        assert backbone(torch.zeros(1, 3, 64, 64)).pooled_ND.shape == (1, backbone.width)


def test_a_tag_that_there_is_not():
    with pytest.raises(UserError, match="no pretrained weights 'dinoo' in timm; it has .*dino"):
        pretrained_cfg("vit_small_patch16_224.dinoo")
    assert pretrained_cfg("vit_small_patch16_224.dino").tag == "dino" and pretrained_cfg("no_such_model") is None
