"""Distillation of features against its definition, and what a teacher must bring. Two seconds."""

from __future__ import annotations

import math

import pytest
import torch

from fastssl.methods.base import Artefact, Facts
from fastssl.methods.distil_features import Teacher, feature_distance
from fastssl.nn.encoders.resnet import ResNet
from fastssl.nn.encoders.vit import ViT
from fastssl.recipes.resolve import resolve
from fastssl.weights.tensor_files import WeightsError
from loaders.files import sha256_of
from loaders.plan.views import CIFAR10, IMAGENET

VIT = ("teacher_encoder=vit(24,4,16,1,2)", "encoder.base_width=4")
PIXELS = "teacher_pixels=pixels((0.5,0.5,0.5),(0.25,0.5,1))"


def normal(*shape: int) -> torch.Tensor:
    return torch.randn(shape, dtype=torch.float64)


@pytest.mark.parametrize("measure", ["cosine", "mse"])
def test_the_loss_is_its_definition_row_by_row_and_reaches_the_student_alone(measure):
    """Catches a sum for a mean, a cosine over the batch, and a teacher that is trained."""
    torch.manual_seed(0)
    student, teacher = normal(5, 3).requires_grad_(), normal(5, 3).requires_grad_()
    rows = []
    for s, t in zip(student.tolist(), teacher.tolist(), strict=True):
        dot = sum(a * b for a, b in zip(s, t, strict=True))
        cosine = dot / math.sqrt(sum(a * a for a in s) * sum(b * b for b in t))
        squares = sum((a - b) ** 2 for a, b in zip(s, t, strict=True)) / 3
        rows.append(1 - cosine if measure == "cosine" else squares)
    loss = feature_distance(student, teacher, measure)
    assert loss.item() == pytest.approx(sum(rows) / 5, rel=1e-12)
    loss.backward()
    assert teacher.grad is None and torch.autograd.gradcheck(
        lambda s: feature_distance(s, teacher.detach(), measure), student
    )


def test_a_teacher_sees_pixels_as_its_own_makers_normalised_them():
    """Catches the student's normalisation, and one that is undone the wrong way round."""
    trunk, value = torch.nn.Identity(), torch.rand(2, 3, 4, 4)

    def normalised(pixels):
        mean, std = (torch.tensor(each).view(3, 1, 1) for each in (pixels.mean, pixels.std))
        return (value - mean) / std

    assert torch.allclose(Teacher(trunk, IMAGENET, CIFAR10)(normalised(CIFAR10)), normalised(IMAGENET), atol=1e-6)


def load(tmp_path, state, *changes):
    torch.save(state, tmp_path / "teacher.pth")
    (stage,) = resolve("distil_features.cifar10_small", (*VIT, *changes))
    path = tmp_path / "teacher.pth"
    method = stage.config.build(Facts(10, 3, 0), {"teacher": Artefact(path, sha256_of(path))})
    nets = method.nets()
    method.load_inputs(nets)
    return nets


def test_a_file_of_a_vision_transformer_teaches(tmp_path):
    state = ViT(24, 4, 16, 1, 2).build().state_dict()
    nets = load(tmp_path, state | {"mask_token": torch.zeros(1, 16)}, PIXELS)
    assert torch.equal(nets.frozen.trunk.blocks[0].mlp.fc1.weight, state["blocks.0.mlp.fc1.weight"])
    assert torch.allclose(nets.frozen.scale_C11.flatten(), torch.tensor(CIFAR10.std) / torch.tensor((0.25, 0.5, 1.0)))
    assert nets.online.map.out_features == 16
    assert not any(p.requires_grad for p in nets.frozen.parameters()) and not nets.frozen.training


def test_what_does_not_fit_is_refused(tmp_path):
    """A file that does not say how its images were normalised, and one of another network."""
    state = ViT(24, 4, 16, 1, 2).build().state_dict()
    with pytest.raises(WeightsError, match="does not say how its images were normalised: --set 'teacher_pixels="):
        load(tmp_path, state)
    with pytest.raises(WeightsError, match="patches of 4 pixels, not 8"):
        load(tmp_path, state, PIXELS, "teacher_encoder=vit(24,8,16,1,2)")
    with pytest.raises(WeightsError, match="do not fit"):
        load(tmp_path, ResNet(10, base_width=4).build().state_dict(), PIXELS)
