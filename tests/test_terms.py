"""The losses by formulas written out in float64, and what the terms give gradients to."""

import copy
import doctest
import importlib
import pkgutil
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY
from torch import Tensor, nn

from dino_sd import build, losses, terms
from dino_sd.errors import UserError
from dino_sd.evaluators.accuracy import accuracy, mean_probabilities, scores_of
from dino_sd.loading import shallow
from dino_sd.losses import hits, label_loss, label_losses, softened_kl, taught_loss
from dino_sd.method import Network, SelfDistillation
from dino_sd.models.backbone import Backbone
from dino_sd.models.heads import Classifier, Exit, classifiers, exit_norms
from dino_sd.models.model import Model
from dino_sd.term import Given, Objective, Seen, Term
from dino_sd.terms.born_again import BornAgain, born_again_loss, permute_dark_knowledge
from dino_sd.terms.consistency import Consistency, consistency_loss
from dino_sd.terms.dino import Dino
from dino_sd.terms.distill import Distill, feature_loss
from dino_sd.terms.labels import Labels
from dino_sd.terms.layerwise import Layerwise, layerwise_loss, number_of

STUDENT = [[2.0, 0.0, -1.0], [0.5, 0.5, 3.0], [-1.0, 1.5, 0.0], [0.0, -2.0, 1.0]]
TEACHER = [[1.0, 1.0, -3.0], [0.0, -1.0, 2.5], [2.0, 0.5, -0.5], [1.0, 0.0, 4.0]]
DEPTH_3 = {**TINY["model_args"], "depth": 3}
RESNET = {"channels": [8, 16, 24, 32], "stem_width": 8}


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


def tensor(values: object, grad: bool = False) -> Tensor:
    return torch.tensor(values, dtype=torch.float64, requires_grad=grad)


def probabilities(logits: object, temperature: float = 1.0) -> np.ndarray:
    raised = np.exp(np.asarray(logits, dtype=np.float64) / temperature)
    return raised / raised.sum(-1, keepdims=True)


def cross_entropies(logits: object, targets: np.ndarray) -> np.ndarray:
    return -(targets * np.log(probabilities(logits))).sum(-1)


def softened(student: object, teacher: object, temperature: float) -> float:
    """T^2 * mean over images of sum p * log(p / q)."""
    p, q = probabilities(teacher, temperature), probabilities(student, temperature)
    return temperature**2 * float((p * np.log(p / q)).sum(-1).mean())


def one_hot(labels: list[int], classes: int = 3) -> np.ndarray:
    """Rows of zeros where there is no label."""
    return np.array([[float(label == c) for c in range(classes)] for label in labels])


def constant(value: float):
    return lambda t: value


def backbone_of(name: str, **model_args: object) -> Backbone:
    backbone = Backbone(name, size=(28, 28), channels=1, model_args=model_args)
    backbone.use_fused_attention(False)
    return backbone


def method_of(
    backbone: Backbone,
    parts: dict[str, tuple[float, Term]],
    teacher: Network | None = None,
    follows: bool = False,
    model: Model | None = None,
    views: int = 1,
) -> SelfDistillation:
    """A method with these terms and ten classes, as build.make_method puts it together."""
    heads: dict[str, nn.Module] = {}
    for _, term in parts.values():
        heads |= term.heads(Given(backbone, views, [f"class{c}" for c in range(10)], 1.0, heads, model))
    student = Network(backbone, heads)
    if follows:
        teacher = copy.deepcopy(student)
    weighted = {name: (constant(weight), term) for name, (weight, term) in parts.items()}
    return SelfDistillation(student, teacher, weighted, constant(0.9) if follows else None).train()


def model_of(network: Network, classes: bool = True, **provenance: object) -> Model:
    """A network as others get it from a finished run."""
    state = network.state_dict()
    found = classifiers(state)
    return Model(
        copy.deepcopy(network.backbone), (28, 28), 1.0, [0.5], [0.5], "a tiny run",
        {"step": 4, "steps": 4, **provenance}, heads=found if classes else {},
        classes=[f"class{c}" for c in range(10)] if classes else None, norms=exit_norms(state),
    )  # fmt: skip


# The formulas


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_softened_kl_is_the_mean_over_images(temperature: float):
    student, teacher = tensor(STUDENT, grad=True), tensor(TEACHER, grad=True)
    found = softened_kl(student, teacher, temperature)
    assert found.item() == pytest.approx(softened(STUDENT, TEACHER, temperature), abs=1e-12)
    in_views = softened_kl(student.view(2, 2, 3), teacher.view(2, 2, 3), temperature)
    assert in_views.item() == pytest.approx(found.item(), abs=1e-12)
    found.backward()
    by_hand = temperature * (probabilities(STUDENT, temperature) - probabilities(TEACHER, temperature)) / 4
    assert student.grad is not None and np.allclose(student.grad, by_hand, atol=1e-12)
    assert teacher.grad is None


def test_softened_kl_by_hand():
    """Teacher (3/4, 1/4), student (1/2, 1/2): 3/4 ln 3/2 + 1/4 ln 1/2 nats, of logits T times as far apart."""
    nats = 0.75 * np.log(1.5) + 0.25 * np.log(0.5)
    for temperature in (1.0, 4.0):
        teacher = tensor([[temperature * np.log(3), 0.0]])
        found = softened_kl(tensor([[0.0, 0.0]]), teacher, temperature)
        assert found.item() == pytest.approx(temperature**2 * nats, abs=1e-12)


@pytest.mark.parametrize("temperature", [0.0, -1.0])
def test_temperature_not_above_0_is_an_error(temperature: float):
    logits = tensor(STUDENT)
    for loss in (
        lambda: softened_kl(logits, logits, temperature),
        lambda: consistency_loss(logits, logits, temperature),
        lambda: born_again_loss(logits, logits, label_share=0, temperature=temperature),
        lambda: layerwise_loss([logits], logits, torch.sum, temperature=temperature),
    ):
        with pytest.raises(ValueError, match=f"temperature={temperature}"):
            loss()


@pytest.mark.parametrize("label_share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_born_again_loss(label_share: float, temperature: float):
    student, teacher, labels = tensor(STUDENT, grad=True), tensor(TEACHER, grad=True), [0, 2, 1, 2]
    found = born_again_loss(student, teacher, torch.tensor(labels), label_share=label_share, temperature=temperature)
    supervised = cross_entropies(STUDENT, one_hot(labels)).mean()
    expected = label_share * supervised + (1 - label_share) * softened(STUDENT, TEACHER, temperature)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found.backward()
    assert student.grad is not None and student.grad.abs().sum() > 0
    assert teacher.grad is None


def test_born_again_loss_with_half_the_labels():
    """The sum over those that have one, divided by the number expected: 4 images * 0.75, though there are two here."""
    labels = [0, -1, 1, -1]
    found = born_again_loss(tensor(STUDENT), tensor(TEACHER), torch.tensor(labels), labelled=0.75)
    supervised = cross_entropies(STUDENT, one_hot(labels)).sum() / 3
    assert found.item() == pytest.approx(0.5 * supervised + 0.5 * softened(STUDENT, TEACHER, 1.0), abs=1e-12)


def test_born_again_loss_with_mixed_labels():
    mixed = [[0.7, 0.3, 0.0], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7]]
    found = born_again_loss(tensor(STUDENT), tensor(TEACHER), tensor(mixed), label_share=0.25, temperature=2.0)
    supervised = cross_entropies(STUDENT, np.array(mixed)).mean()
    assert found.item() == pytest.approx(0.25 * supervised + 0.75 * softened(STUDENT, TEACHER, 2.0), abs=1e-12)
    hard = born_again_loss(tensor(STUDENT), tensor(TEACHER), tensor(one_hot([0, 2, 1, 2])))
    assert hard.item() == pytest.approx(
        born_again_loss(tensor(STUDENT), tensor(TEACHER), torch.tensor([0, 2, 1, 2])).item(), abs=1e-12
    )


@pytest.mark.parametrize("weighting", ["none", "cwtm", "dkpp"])
def test_born_again_loss_without_the_labels_it_needs(weighting: str):
    with pytest.raises(ValueError, match="needs labels"):
        born_again_loss(tensor(STUDENT), tensor(TEACHER), weighting=weighting)  # pyright: ignore


@pytest.mark.parametrize("labels", [[0, 2, 1, 2], [0, -1, 1, -1]])
def test_cwtm_weighs_images_by_the_teachers_confidence(labels: list[int]):
    teacher = tensor(TEACHER, grad=True)
    student = tensor(STUDENT, grad=True)
    found = born_again_loss(student, teacher, torch.tensor(labels), weighting="cwtm")
    confidence = probabilities(TEACHER).max(-1) * (np.array(labels) >= 0)
    expected = (cross_entropies(STUDENT, one_hot(labels)) * confidence).sum() / confidence.sum()
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found.backward()
    assert teacher.grad is None and student.grad is not None


def test_cwtm_of_a_batch_without_labels_is_zero():
    found = born_again_loss(tensor(STUDENT), tensor(TEACHER), torch.full((4,), -1), weighting="cwtm")
    assert found.item() == 0


def test_dkpp_shuffles_all_but_the_likeliest_class():
    logits = torch.randn(64, 10, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(5)
    shuffled = permute_dark_knowledge(logits)
    torch.manual_seed(5)
    assert torch.equal(shuffled, permute_dark_knowledge(logits))
    torch.manual_seed(6)
    assert not torch.equal(shuffled, permute_dark_knowledge(logits))
    top = logits.argmax(1)
    assert torch.equal(shuffled.argmax(1), top)
    assert torch.equal(shuffled.amax(1), logits.amax(1))
    assert torch.equal(shuffled.sort(1).values, logits.sort(1).values)
    others = ~F.one_hot(top, 10).bool()
    stayed = (shuffled == logits)[others].double().mean().item()
    assert stayed == pytest.approx(1 / 9, abs=0.06)  # as often as by chance
    labels = torch.randint(10, (64,), generator=torch.Generator().manual_seed(1))
    student, teacher = tensor(np.zeros((64, 10)) + 0.1 * np.arange(10), grad=True), logits.requires_grad_()
    torch.manual_seed(5)
    found = born_again_loss(student, teacher, labels, temperature=2.0, weighting="dkpp")
    expected = 0.5 * cross_entropies(student.detach().numpy(), one_hot(labels.tolist(), 10)).mean()
    expected += 0.5 * softened(student.detach().numpy(), shuffled.detach().numpy(), 2.0)
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found.backward()
    assert teacher.grad is None


def test_layerwise_loss():
    """Two exits, with the T^2, the hint a sum over dimensions and a mean over images."""
    exits = [tensor(STUDENT, grad=True), tensor(np.array(STUDENT)[::-1].copy(), grad=True)]
    deepest = tensor(TEACHER, grad=True)
    features = [tensor(np.arange(8.0).reshape(4, 2), grad=True), tensor(np.ones((4, 2)), grad=True)]
    deepest_features = tensor(np.eye(4)[:, :2], grad=True)
    labels = [0, 2, 1, 2]
    found = layerwise_loss(
        exits, deepest, lambda logits: F.cross_entropy(logits, torch.tensor(labels)), teacher_share=0.3,
        temperature=3.0, exit_features=features, deepest_features=deepest_features, hint=0.03,
    )  # fmt: skip
    expected = 0.0
    for logits, own in zip((STUDENT, STUDENT[::-1]), (np.arange(8.0).reshape(4, 2), np.ones((4, 2))), strict=True):
        expected += 0.7 * cross_entropies(logits, one_hot(labels)).mean() + 0.3 * softened(logits, TEACHER, 3.0)
        expected += 0.03 * ((own - np.eye(4)[:, :2]) ** 2).sum(-1).mean()
    assert found.item() == pytest.approx(expected, abs=1e-12)
    found.backward()
    assert deepest.grad is None and deepest_features.grad is None
    assert all(part.grad is not None and part.grad.abs().sum() > 0 for part in (*exits, *features))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_consistency_loss(temperature: float):
    augmented, clean = tensor(STUDENT, grad=True), tensor(TEACHER, grad=True)
    found = consistency_loss(augmented, clean, temperature)
    assert found.item() == pytest.approx(softened(STUDENT, TEACHER, temperature), abs=1e-12)
    found.backward()
    assert clean.grad is None and augmented.grad is not None


def test_feature_loss():
    student, teacher = tensor([[3.0, 4.0], [1.0, 0.0], [1.0, 1.0]], grad=True), tensor([[4.0, 3.0], [0, 2], [-1, -1]])
    teacher.requires_grad_()
    found = feature_loss(student, teacher)
    assert found.item() == pytest.approx(1 - (24 / 25 + 0 - 1) / 3, abs=1e-12)
    found.backward()
    assert teacher.grad is None and student.grad is not None


@pytest.mark.parametrize("label_share", [0.0, 0.5])
def test_taught_loss_without_labels_is_the_teachers_part(label_share: float):
    found = taught_loss(tensor(STUDENT), tensor(TEACHER), None, label_share=label_share, temperature=2.0)
    assert found.item() == pytest.approx((1 - label_share) * softened(STUDENT, TEACHER, 2.0), abs=1e-12)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_label_smoothing(smoothing: float):
    labels = [0, 2, -1, 2]
    targets = (1 - smoothing) * one_hot(labels) + smoothing / 3
    expected = cross_entropies(STUDENT, targets) * (np.array(labels) >= 0)
    found = label_losses(tensor(STUDENT), torch.tensor(labels), smoothing)
    assert np.allclose(found, expected, atol=1e-12)
    mixed = [[0.7, 0.3, 0.0], [0.0, 0.5, 0.5], [0.0, 1.0, 0.0], [0.1, 0.2, 0.7]]
    expected = cross_entropies(STUDENT, (1 - smoothing) * np.array(mixed) + smoothing / 3)
    assert np.allclose(label_losses(tensor(STUDENT), tensor(mixed), smoothing), expected, atol=1e-12)


def test_hits_count_labelled_images_alone():
    logits = tensor(STUDENT)  # likeliest: 0, 2, 1, 2
    assert hits(logits, torch.tensor([0, 1, -1, 2])).item() == pytest.approx(2 / 3)
    assert hits(logits, torch.full((4,), -1)).item() == 0
    assert hits(logits, tensor([[0.6, 0.4, 0], [0, 0.6, 0.4], [0.4, 0.6, 0], [0, 0, 1]])).item() == 0.75


def seen(logits_VBC: Tensor, labels: Tensor) -> Seen:
    return Seen(outputs={"classifier": logits_VBC}, labels=labels)


@pytest.mark.parametrize("name", ["labels", "born_again", "distill"])
def test_a_batch_is_the_mean_of_its_parts(name: str):
    """Partly labelled, two views: no part weighs more for having fewer labels."""
    made = {"labels": Labels(smoothing=0.1), "born_again": BornAgain(temperature=2.0), "distill": Distill()}
    term = made[name]
    term.labelled = 0.5  # pyright: ignore
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(2, 2, 16, 10, dtype=torch.float64, generator=random).unbind()
    labels = torch.randint(10, (16,), generator=random)
    labels[:4], labels[4:7], labels[9] = -1, -1, -1
    whole = term(seen(student, labels), seen(teacher, labels), 0.0)
    parts = [
        term(seen(student[:, part], labels[part]), seen(teacher[:, part], labels[part]), 0.0)
        for part in (slice(start, start + 4) for start in range(0, 16, 4))
    ]
    assert whole.item() == pytest.approx(sum(part.item() for part in parts) / 4, abs=1e-12)
    if name == "labels":
        known = [i for i, label in enumerate(labels.tolist()) if label >= 0]
        targets = 0.9 * one_hot(labels[known].tolist(), 10) + 0.01
        total = sum(cross_entropies(view[known].numpy(), targets).sum() for view in student)
        assert whole.item() == pytest.approx(total / (2 * 16 * 0.5), abs=1e-12)


def test_label_loss_divides_by_the_number_expected():
    found = label_loss(tensor(STUDENT), torch.tensor([0, -1, -1, -1]), labelled=0.5)
    assert found.item() == pytest.approx(cross_entropies(STUDENT, one_hot([0, -1, -1, -1])).sum() / 2, abs=1e-12)


def test_born_again_and_distill_learn_from_global_views_alone():
    """The teacher's views are the first of the student's; the rest, local crops, it never saw."""
    random = torch.Generator().manual_seed(0)
    student, teacher = torch.randn(3, 4, 3, dtype=torch.float64, generator=random), tensor([TEACHER])
    labels = torch.tensor([0, 2, 1, 2])
    expected = 0.5 * cross_entropies(student[0].numpy(), one_hot(labels.tolist())).mean()
    for term, temperature in ((BornAgain(temperature=2.0), 2.0), (Distill(temperature=5.0), 5.0)):
        found = term(seen(student, labels), seen(teacher, labels), 0.0)
        taught = 0.5 * softened(student[0].numpy(), TEACHER, temperature)
        assert found.item() == pytest.approx(expected + taught, abs=1e-12)


# What learns from what


def learned(module: nn.Module) -> bool:
    return any(parameter.grad is not None and bool(parameter.grad.any()) for parameter in module.parameters())


@pytest.mark.parametrize("hint", [0.0, 0.03])
@pytest.mark.parametrize(
    ("name", "model_args", "stages"),
    [("vit_tiny_patch16_224", DEPTH_3, "blocks"), ("resnet10t", RESNET, "layer")],
)
def test_deepest_exit_learns_nothing_from_the_shallow_ones(name: str, model_args: dict, stages: str, hint: float):
    backbone = backbone_of(name, **model_args)
    companion = Layerwise(layers=[1], teacher_share=1.0, hint=hint)
    method = method_of(backbone, {"labels": (0.0, Labels()), "layerwise": (1.0, companion)})
    exit = method.student.heads["exit_1"]
    assert isinstance(exit, Exit)
    for head in (exit.head, method.student.heads["classifier"]):  # so that they disagree
        nn.init.normal_(head.weight)  # pyright: ignore
    images = torch.randn(8, 1, 28, 28)
    sum(method([images], 8, torch.arange(8), 0.0).values()).backward()  # pyright: ignore
    blocks = (
        backbone.model.blocks if stages == "blocks" else [getattr(backbone.model, f"layer{n}") for n in range(1, 5)]
    )
    assert not learned(method.student.heads["classifier"])
    assert learned(blocks[0]) and learned(exit.features.norm) and learned(exit.features.project) and learned(exit.head)
    assert not any(learned(block) for block in blocks[1:])


def test_labels_teach_the_whole_network():
    backbone = backbone_of("vit_tiny_patch16_224", **DEPTH_3)
    method = method_of(backbone, {"labels": (1.0, Labels()), "layerwise": (0.0, Layerwise(layers=[1]))})
    nn.init.normal_(method.student.heads["classifier"].weight)  # pyright: ignore
    sum(method([torch.randn(8, 1, 28, 28)], 8, torch.arange(8), 0.0).values()).backward()  # pyright: ignore
    assert all(learned(block) for block in backbone.model.blocks) and learned(method.student.heads["classifier"])
    assert not learned(method.student.heads["exit_1"])


def test_layerwise_term_is_its_formula():
    """Each exit learns from the anchor's own loss, smoothing included, and from the deepest output."""
    backbone = backbone_of("vit_tiny_patch16_224", **DEPTH_3)
    parts = {"labels": (1.0, Labels(smoothing=0.1)), "layerwise": (2.0, Layerwise(layers=[1, 2], hint=0.03))}
    method = method_of(backbone, parts).double()
    images, labels = torch.randn(6, 1, 28, 28, dtype=torch.float64), [0, 1, 2, 3, 4, 5]
    losses = method([images], 6, torch.tensor(labels), 0.0)
    said = method.student([images], 6)
    outputs = {name: output[0].detach().numpy() for name, output in said.outputs.items()}
    pooled, targets = said.pooled[0].detach().numpy(), 0.9 * one_hot(labels, 10) + 0.01
    expected = 0.0
    for exit in (1, 2):
        logits = outputs[f"exit_{exit}"]
        expected += 0.7 * cross_entropies(logits, targets).mean() + 0.3 * softened(logits, outputs["classifier"], 3.0)
        expected += 0.03 * ((outputs[f"hint_{exit}"] - pooled) ** 2).sum(-1).mean()
    assert losses["labels"].item() == pytest.approx(cross_entropies(outputs["classifier"], targets).mean(), abs=1e-9)
    assert losses["layerwise"].item() == pytest.approx(2 * expected, abs=1e-9)


def test_layerwise_with_dino_reads_its_logits_as_its_softmax_does():
    """Dino divides cosines by 0.1: so does the divergence of its exits, in whose unit T is."""
    term = Layerwise(layers=[1], teacher_share=0.4, temperature=3.0)
    term.head, term.exits = "dino", [1]
    deepest, exit = torch.randn(2, 2, 4, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).unbind()
    student = Seen(outputs={"dino": deepest, "exit_1": exit})
    student.objectives["dino"] = Objective(lambda logits: logits.square().mean(), 0.1)
    found = term(student, Seen(), 0.0).item()
    divergence = softened(exit.flatten(0, 1).numpy() / 0.1, deepest.flatten(0, 1).numpy() / 0.1, 3.0)
    assert found == pytest.approx(0.6 * exit.square().mean().item() + 0.4 * divergence, abs=1e-9)


@pytest.mark.parametrize(
    ("name", "model_args", "exits"),
    [
        ("vit_tiny_patch16_224", DEPTH_3, (1, 2)),
        ("vit_tiny_patch16_224", {**DEPTH_3, "reg_tokens": 2}, (2,)),
        ("vit_tiny_patch16_224", {**DEPTH_3, "global_pool": "avg", "class_token": False}, (2,)),
        ("vit_tiny_patch16_224", {**DEPTH_3, "global_pool": "avg"}, (2,)),
        ("vit_tiny_patch16_224", {**DEPTH_3, "global_pool": "avg", "class_token": False, "reg_tokens": 2}, (2,)),
        ("resnet10t", RESNET, (1, 3)),
    ],
)
def test_an_exit_is_a_shallow_network(name: str, model_args: dict, exits: tuple[int, ...]):
    backbone = backbone_of(name, **model_args)
    method = method_of(backbone, {"labels": (1.0, Labels()), "layerwise": (1.0, Layerwise(layers=exits))})
    for name, parameter in method.student.named_parameters():
        if "heads" in name or "norm" in name:
            nn.init.normal_(parameter, std=0.5)
    with torch.no_grad():
        method([torch.randn(8, 1, 28, 28)], 8, torch.arange(8), 0.0)  # batch norms see something
        method.eval()
        images = torch.randn(5, 1, 28, 28)
        outputs = method.student([images], 5).outputs
        for exit in exits:
            part = shallow(model_of(method.student), exit)
            assert isinstance(part.backbone, Backbone)
            part.backbone.eval()
            logits = part.heads["classifier"](part.backbone.pooled(images)[0])
            assert torch.allclose(logits, outputs[f"exit_{exit}"][0], atol=1e-5, rtol=1e-5)
            assert torch.allclose(part.backbone(images).pooled_ND, part.backbone.pooled(images)[0], atol=1e-5)
            few, all_ = (sum(p.numel() for p in b.parameters()) for b in (part.backbone, backbone))
            assert few < all_ and len(part.backbone.widths) == exit
            head = method.student.heads[f"exit_{exit}"]
            assert isinstance(head, Exit) and isinstance(folded := head.folded(), Classifier)
            tokens = backbone.pooled(images, [exit])[1]
            assert torch.allclose(folded(head.features.norm(tokens)), head(tokens), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("model_args", [{"global_pool": "map"}, {"global_pool": "avg", "fc_norm": False}])
def test_what_cannot_be_cut_is_refused(model_args: dict):
    network = Network(backbone_of("vit_tiny_patch16_224", **DEPTH_3, **model_args), {})
    with pytest.raises(UserError, match="exit=2.*cannot be cut"):
        shallow(model_of(network), 2)


def test_shares_of_the_depth():
    assert [number_of(layer, "vit", 12) for layer in (0.25, 0.5, 7, 11)] == [3, 6, 7, 11]
    for layer in (12, 13, 0.99, 1.5, 0.01):
        with pytest.raises(UserError, match=r"terms.layerwise.layers: .*12 blocks.*1 to 11"):
            number_of(layer, "vit", 12)


# Who is the teacher, and who the result


class Spy(Term):
    """Remembers what it was shown."""

    def __init__(self, *needs: str):
        super().__init__()
        self.needs = frozenset(needs)

    def forward(self, student: Seen, teacher: Seen, t: float) -> Tensor:
        self.student, self.teacher = student, teacher
        return student.pooled[0].new_zeros(())


def tiny_vit() -> Backbone:
    return backbone_of("vit_tiny_patch16_224", **TINY["model_args"])


def test_the_result_is_the_student_unless_the_teacher_follows():
    labels = method_of(tiny_vit(), {"labels": (1.0, Labels())})
    assert labels.result == "student" and not list(labels.teacher.parameters()) and not labels.wants_clean
    parts: dict[str, tuple[float, Term]] = {"labels": (1.0, Labels()), "consistency": (1.0, Consistency())}
    assert method_of(tiny_vit(), parts).result == "student"
    parts = {"labels": (1.0, Labels()), "consistency": (1.0, Consistency(target="teacher"))}
    assert method_of(tiny_vit(), parts, follows=True).result == "teacher"
    dino = Dino(prototypes=16, hidden=8, bottleneck=8, teacher_temperature=constant(0.04))
    assert method_of(tiny_vit(), {"dino": (1.0, dino)}, follows=True, views=2).result == "teacher"
    parent = method_of(tiny_vit(), {"labels": (1.0, Labels())}).student
    model = model_of(parent)
    assert isinstance(model.backbone, Backbone)
    taught = method_of(
        tiny_vit(), {"born_again": (1.0, BornAgain())}, Network(model.backbone, model.heads), False, model
    )
    assert taught.result == "student" and taught.momentum is None


def test_frozen_teacher_does_not_move_with_its_batch_norm():
    parent = method_of(backbone_of("resnet10t", **RESNET), {"labels": (1.0, Labels())}).student
    model = model_of(parent)
    assert isinstance(model.backbone, Backbone)
    teacher = Network(model.backbone, model.heads)
    method = method_of(backbone_of("resnet10t", **RESNET), {"born_again": (1.0, BornAgain())}, teacher, False, model)
    before = copy.deepcopy(method.teacher.state_dict())
    students = copy.deepcopy(method.student.state_dict())
    optimizer = torch.optim.SGD(method.student.parameters(), lr=0.1)
    method.train()
    sum(method([3 * torch.randn(8, 1, 28, 28)], 8, torch.arange(8), 0.0).values()).backward()  # pyright: ignore
    optimizer.step()
    method.after_step(0.0)
    assert all(torch.equal(value, before[key]) for key, value in method.teacher.state_dict().items())
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in method.teacher.parameters())
    moved = {key for key, value in method.student.state_dict().items() if not torch.equal(value, students[key])}
    assert any("running_mean" in key for key in moved) and "heads.classifier.weight" in moved


def test_frozen_teacher_gets_images_in_its_own_normalisation():
    network = method_of(tiny_vit(), {"labels": (1.0, Labels())}).student.eval()
    model = model_of(network)  # mean 0.5, std 0.5
    teacher = build.teacher_network(model, {"mean": [0.2], "std": [0.4]}).eval()
    pixels = torch.rand(4, 1, 28, 28)
    with torch.no_grad():
        found = teacher([(pixels - 0.2) / 0.4], 4).outputs["classifier"]
        expected = network([(pixels - 0.5) / 0.5], 4).outputs["classifier"]
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("target", ["student", "teacher"])
def test_clean_images_are_the_last_group_and_give_no_gradient(target: str):
    spy = Spy(f"{target}.clean")
    parts: dict[str, tuple[float, Term]] = {
        "labels": (0.0, Labels()), "consistency": (1.0, Consistency(target=target)), "spy": (1.0, spy),  # pyright: ignore
    }  # fmt: skip
    method = method_of(tiny_vit(), parts, follows=target == "teacher")
    nn.init.normal_(method.student.heads["classifier"].weight)  # pyright: ignore
    assert method.wants_clean
    views, clean = torch.randn(2 * 4, 1, 28, 28), torch.randn(4, 1, 28, 28)
    losses = method([views, clean], 4, torch.arange(4), 0.0)
    clean_seen = (spy.student if target == "student" else spy.teacher).clean
    other = (spy.teacher if target == "student" else spy.student).clean
    assert clean_seen is not None and other is None
    logits = clean_seen.outputs["classifier"]
    assert not logits.requires_grad and spy.student.outputs["classifier"].requires_grad
    assert logits.shape == (1, 4, 10) and spy.student.outputs["classifier"].shape == (2, 4, 10)
    assert len(spy.student.pooled) == 2
    with torch.no_grad():
        network: Network = getattr(method, target)
        expected = network([clean], 4).outputs["classifier"]
        augmented = method.student([views], 4).outputs["classifier"]
    assert torch.allclose(logits, expected, atol=1e-6)
    by_hand = softened(augmented.flatten(0, 1).numpy(), expected.repeat(2, 1, 1).flatten(0, 1).numpy(), 4.0)
    assert losses["consistency"].item() == pytest.approx(by_hand, rel=1e-4)
    losses["consistency"].backward()
    assert not any(parameter.grad is not None for parameter in method.teacher.parameters())


# Accuracy


def test_accuracy_on_hand_made_logits():
    """Of six classes and four images: labels at ranks 1, 2, 5 and 6; equal logits count for the lower class."""
    logits = torch.tensor([
        [9.0, 1, 2, 3, 4, 5],
        [9.0, 8, 2, 3, 4, 5],
        [1.0, 9, 8, 7, 6, 2],
        [1.0, 9, 8, 7, 6, 2],
    ])  # fmt: skip
    result = accuracy(logits, torch.tensor([0, 1, 5, 0]))
    assert (result.top1, result.top5) == (25.0, 75.0)
    assert result.per_class[:2] == [50.0, 0.0] and result.per_class[5] == 0.0
    assert result.per_class[2:5] == [None, None, None]
    ties = accuracy(torch.zeros(6, 6), torch.arange(6))
    assert ties.top1 == pytest.approx(100 / 6) and ties.top5 == pytest.approx(500 / 6)
    assert ties.per_class == [100.0, 0, 0, 0, 0, 0]
    few = accuracy(torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.tensor([1, 1]))
    assert (few.top1, few.top5, few.per_class[1]) == (50.0, 100.0, 50.0)


@pytest.mark.parametrize(
    ("logits", "labels", "words"),
    [
        (torch.zeros(2, 3), torch.tensor([0, -1]), "no label"),
        (torch.zeros(2, 3), torch.tensor([0, 3]), "class 3, the model knows 3 classes"),
        (torch.zeros(0, 3), torch.empty(0, dtype=torch.int64), "no images"),
        (torch.tensor([[0.0, torch.nan]]), torch.tensor([0]), "not finite"),
    ],
)
def test_accuracy_of_what_cannot_be_judged(logits: Tensor, labels: Tensor, words: str):
    with pytest.raises(UserError, match=words):
        accuracy(logits, labels)


def test_an_ensemble_means_probabilities_not_logits():
    """One member is sure of class 0 by far in logits, by little in probability; two lean to class 1."""
    sure, lean = torch.tensor([[20.0, 0.0]]), torch.tensor([[0.0, 4.0]])
    members = [sure, lean, lean]
    assert torch.stack(members).mean(0).argmax().item() == 0
    found = mean_probabilities(members)
    expected = np.mean([probabilities(member.numpy()) for member in members], axis=0)
    assert np.allclose(found, expected, atol=1e-12) and found.argmax().item() == 1
    scores = scores_of(dict(zip("abc", members, strict=True)), torch.tensor([1]))
    assert {name: score.top1 for name, score in scores.items()} == {"a": 0, "b": 100, "c": 100, "ensemble": 100}
    assert scores_of({"a": sure}, torch.tensor([1])).keys() == {"a"}


# The examples in the docstrings

MODULES = [f"dino_sd.terms.{module.name}" for module in pkgutil.iter_modules([str(Path(terms.__path__[0]))])]


@pytest.mark.parametrize("name", [*MODULES, losses.__name__])
def test_examples_in_docstrings_run(name: str):
    done = doctest.testmod(importlib.import_module(name))
    assert done.failed == 0
    assert done.attempted > 0 or name.rsplit(".", 1)[1] not in ("dino", "born_again", "layerwise", "consistency")
