"""The reference law: this code gives the numbers of the authors' published code.

Reads the folder named in DINO_SD_REFERENCE (default: ../shared/reference beside the clone) and assumes nothing about
the numbers in it: sizes, counts and schedules are taken from the files.
"""

import argparse
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

import dino_sd
from dino_sd import cli, schedule
from dino_sd.method import Network, SelfDistillation
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import ProjectionHead
from dino_sd.optim import clip_each_, make_optimizer, set_rates
from dino_sd.term import Seen
from dino_sd.terms.dino import Dino, dino_loss

FOLDER = Path(os.environ.get("DINO_SD_REFERENCE", Path(__file__).parents[2] / "shared" / "reference"))
pytestmark = pytest.mark.skipif(not FOLDER.is_dir(), reason=f"no reference numbers at {FOLDER} (DINO_SD_REFERENCE)")
TOLERANCE = 1e-9
PUBLISHED = FOLDER / "published_checkpoint.pth"
HEADS = "num_heads=2"  # which neither tensors nor arguments of that file say (its README does)


def numbers(name: str) -> dict[str, Tensor]:
    with np.load(FOLDER / f"{name}.npz", allow_pickle=False) as file:
        return {key: torch.from_numpy(np.asarray(file[key])) for key in file.files}


def agree(ours: Tensor, theirs: Tensor, what: str, tolerance: float = TOLERANCE) -> None:
    error = (ours.detach().double() - theirs.double()).abs().max() / theirs.double().abs().max().clamp(min=1e-30)
    assert error <= tolerance, f"{what}: relative error {error:.3g}"


def by_prefix(file: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in file.items() if key.startswith(prefix)}


def seen(logits_ND: Tensor, batch: int) -> Seen:
    return Seen([], {"dino": logits_ND.unflatten(0, (-1, batch))})


def test_loss_center_and_gradients():
    file = numbers("dino_loss")
    calls = sum(key.startswith("loss_") for key in file)
    prototypes = file["center_after_0"].shape[-1]
    temperatures = [float(file[f"teacher_temp_{i}"]) for i in range(calls)]
    term = Dino(prototypes=prototypes, teacher_temperature=lambda t: temperatures[round(t * calls)]).double()
    batch = len(file["teacher_logits_0"]) // 2  # two global views
    for i in range(calls):
        student = file[f"student_logits_{i}"].requires_grad_()
        loss = term(seen(student, batch), seen(file[f"teacher_logits_{i}"], batch), i / calls)
        loss.backward()
        term.after_step(i / calls)
        agree(loss, file[f"loss_{i}"], f"loss of call {i}")
        agree(student.grad, file[f"grad_student_{i}"], f"gradient of call {i}")  # pyright: ignore
        agree(term.center, file[f"center_after_{i}"][0], f"centre after call {i}")


def test_loss_needs_two_views():
    with pytest.raises(ValueError, match="two views"):
        dino_loss(torch.zeros(1, 2, 3), torch.full((1, 2, 3), 1 / 3))


def head_of(parameters: dict[str, Tensor], learned_norm: bool) -> ProjectionHead:
    """A head as wide as the given parameters."""
    mlp = sorted(key for key in parameters if key.startswith("mlp.") and key.endswith("weight"))
    prototypes, bottleneck = parameters["last_layer.weight_v"].shape
    head = ProjectionHead(
        parameters[mlp[0]].shape[1],
        prototypes=prototypes,
        hidden=parameters[mlp[0]].shape[0],
        bottleneck=bottleneck,
        layers=len(mlp),
        learned_norm=learned_norm,
    ).double()
    head.load_state_dict(parameters)
    return head


@pytest.mark.parametrize("kind", ["norm", "free"])
def test_head(kind: str):
    file = numbers(f"dino_head_{kind}")
    head = head_of(by_prefix(file, "param:"), learned_norm=kind == "free")
    x = file["x"].requires_grad_()
    y = head(x)
    y.backward(file["upstream"])
    agree(y, file["y"], "output")
    agree(x.grad, file["grad_x"], "gradient of the input")  # pyright: ignore
    grads = {name: parameter.grad for name, parameter in head.named_parameters() if parameter.grad is not None}
    assert grads.keys() == by_prefix(file, "grad:").keys()
    for name, grad in by_prefix(file, "grad:").items():
        agree(grads[name], grad, f"gradient of {name}")


def test_schedules():
    file = numbers("schedules")
    for i in range(sum(key.startswith("args_") for key in file)):
        base, final, epochs, per_epoch, warmup_epochs = file[f"args_{i}"].tolist()
        steps, warmup = round(epochs * per_epoch), round(warmup_epochs * per_epoch)
        at = schedule.cosine(base, final, steps, warmup)
        ours = torch.tensor([at(step / steps) for step in range(steps)], dtype=torch.float64)
        agree(ours, file[f"values_{i}"], f"schedule {i}")


@pytest.mark.parametrize("kind", ["norm", "free"])
def test_trajectory(kind: str):
    file = numbers(f"trajectory_{kind}")
    steps, views, batch, channels, height, width = file["views"].shape
    per_epoch, frozen_epochs = int(file["steps_per_epoch"]), int(file["freeze_last_layer_epochs"])
    method = method_of(file, learned_norm=kind == "free", frozen_until=frozen_epochs * per_epoch / steps)
    optimizer = make_optimizer("adamw", method.student)
    parameters = list(method.student.parameters())
    clip = float(file["clip"])
    for step in range(steps):
        t = step / steps
        set_rates(optimizer, float(file["lr"][step]), float(file["weight_decay"][step]))
        crops = file["views"][step].double()
        groups = [crops[:2].flatten(0, 1), crops[2:].flatten(0, 1)]
        loss = method(groups, batch, None, t)["dino"]
        loss.backward()
        norm = clip_each_(parameters, clip)
        for parameter in method.frozen_parameters(t):
            parameter.grad = None
        optimizer.step()
        optimizer.zero_grad()
        method.after_step(t)
        agree(loss, file["loss"][step], f"loss of step {step}")
        agree(norm, file["max_grad_norm"][step], f"largest gradient norm of step {step}")
    for name, network in (("student", method.student), ("teacher", method.teacher)):
        ours = {published_name(key): value for key, value in network.state_dict().items()}
        theirs = by_prefix(file, f"final_{name}:")
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            agree(ours[key], value, f"{name}'s {key} at the end")
    agree(method.terms["dino"].center, file["center"][0], "centre at the end")  # pyright: ignore


def published_name(key: str) -> str:
    return key.replace("backbone.model.", "backbone.").replace("heads.dino.", "head.")


def method_of(file: dict[str, Tensor], learned_norm: bool, frozen_until: float) -> SelfDistillation:
    steps, per_epoch = len(file["loss"]), int(file["steps_per_epoch"])
    init = by_prefix(file, "init:")
    head = by_prefix(init, "head.")

    def temperature(t: float) -> float:
        return float(file["teacher_temp"][round(t * steps) // per_epoch])

    def network() -> Network:
        width, channels, patch, _ = init["backbone.patch_embed.proj.weight"].shape
        backbone = Backbone(
            "vit_tiny_patch16_224",
            size=(file["views"].shape[-2], file["views"].shape[-1]),
            channels=channels,
            # two heads is the one size that the file's tensors do not show (its README says it)
            model_args={
                "patch_size": patch, "embed_dim": width, "num_heads": 2,
                "depth": sum(key.endswith("attn.qkv.weight") for key in init),
            },
        )  # fmt: skip
        made = Network(backbone, {"dino": head_of(head, learned_norm)}).double()
        made.load_state_dict(
            {k.replace("backbone.", "backbone.model.").replace("head.", "heads.dino."): v for k, v in init.items()}
        )
        for made_head in made.heads.values():
            made_head.frozen_until = frozen_until  # pyright: ignore
        return made

    term = Dino(prototypes=len(head["last_layer.weight_v"]), teacher_temperature=temperature)
    momentum = file["momentum"].tolist()
    method = SelfDistillation(
        network(), network(), {"dino": (schedule.constant(1.0), term)}, lambda t: momentum[round(t * steps)]
    )
    return method.double().train()


def test_published_checkpoint():
    """The authors' file layout: features, the head's logits, and positions resized in the authors' way by itself."""
    file, model = numbers("published_expected"), dino_sd.load(f"{PUBLISHED},{HEADS}")
    x224, x96 = file["x224"].float(), file["x96"].float()
    features_ND = model.features(x224)
    assert model.projection is not None and model.center is not None
    agree(features_ND, file["cls224"], "class token", 1e-5)
    agree(model.projection(features_ND), file["logits224"], "the head's logits", 1e-5)
    last = range(-len(file["last4_cls224"]), 0)
    agree(torch.stack(model.features(x224, layers=last)), file["last4_cls224"], "class tokens of the last blocks", 1e-5)
    agree(model.features(x96), file["cls96"], "class token at 96 pixels", 1e-5)
    assert isinstance(model.backbone, Backbone)
    agree(model.backbone.pooled(x96)[0], file["cls96"], "class token at 96 pixels, as in training", 1e-5)
    assert torch.equal(model.center, published()["dino_loss"]["center"][0])
    assert "teacher after epoch 3 of 4" in model.description and "student" not in model.description


def published() -> dict:
    with torch.serialization.safe_globals([argparse.Namespace]):
        return torch.load(PUBLISHED, weights_only=True)


ALTERED = {
    "a key dropped": ["missing blocks.2.mlp.fc1.weight", "incomplete or was altered"],
    "a key renamed": ["renamed", "blocks.2.mlp.fc1.weight seems to stand there as blocks.2.mlp.fc_1.weight"],
    "another patch size": ["patches of 8 pixels", "patch_size=16"],
    "two registers more": ["2 register token(s), the model has 0"],
    "two positions more": ["199 entries", "2 register(s) more"],
}


@pytest.mark.parametrize("heads", [f",{HEADS}", ""], ids=["heads said", "heads unknown"])
@pytest.mark.parametrize("how", ALTERED)
def test_altered_copies_of_it_exit_with_2(tmp_path: Path, monkeypatch, capsys, how: str, heads: str):
    found, key = published(), "backbone.blocks.2.mlp.fc1.weight"
    state = found["teacher"]
    if how == "a key dropped":
        del state[key]
    elif how == "a key renamed":
        state[key.replace("fc1", "fc_1")] = state.pop(key)
    elif how == "another patch size":
        state["backbone.patch_embed.proj.weight"] = state["backbone.patch_embed.proj.weight"][:, :, ::2, ::2].clone()
    elif how == "two registers more":
        state["backbone.register_tokens"] = torch.zeros(1, 2, 64)
    else:
        state["backbone.pos_embed"] = torch.cat([state["backbone.pos_embed"], torch.zeros(1, 2, 64)], 1)
    torch.save(found, tmp_path / "altered.pth")
    arguments = ["knn", f"{tmp_path / 'altered.pth'}{heads}", "train=fashion-mnist-mini:train",
                 "test=fashion-mnist-mini:test", "device=cpu"]  # fmt: skip
    monkeypatch.setattr("sys.argv", ["dino-sd", *arguments])
    with pytest.raises(SystemExit) as stop:
        cli.main()
    said = capsys.readouterr()
    assert stop.value.code == 2 and said.out == "" and len(said.err.strip().splitlines()) == 1
    assert all(word in said.err for word in ["altered.pth", *ALTERED[how]]), said.err
