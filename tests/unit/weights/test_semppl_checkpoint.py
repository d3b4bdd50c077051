"""A file of the structure of SemPPL's released checkpoints, made of a network of ours, and read back."""

import pickle

import numpy as np
import pytest
import torch

from fastssl.methods.base import Facts
from fastssl.recipes.resolve import resolve
from fastssl.weights import layouts
from fastssl.weights.read import WeightsError, read_weights

SMALL = ("encoder.depth=50", "encoder.base_width=8", "hidden_features=16", "out_features=8", "precision=fp32")


def method(*changes):
    (stage,) = resolve("semppl.rn50_300ep", (*SMALL, *changes))
    return stage.config.build(Facts(10, 3, 0), {})


def written(net, path, devices=()):
    """Its parameters and statistics as Haiku names and stores them, by a transcription from theirs; `devices`: axes
    before all others."""
    params, state = {}, {}

    def kernel(name, module):
        weight = module.weight.detach().numpy()
        array = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        params[name] = {"w": array.reshape(*devices, *array.shape)}
        if module.bias is not None:
            params[name]["b"] = module.bias.detach().numpy().reshape(*devices, -1)

    def norm(name, module, axes):
        shape = (*devices, *(1,) * axes, -1)
        params[name] = {"scale": module.weight.detach().numpy().reshape(shape),
                        "offset": module.bias.detach().numpy().reshape(shape)}  # fmt: skip
        for kind, values in (("mean", module.running_mean), ("var", module.running_var)):
            average = values.numpy().reshape(shape)
            state[f"{name}/~/{kind}_ema"] = {"average": average, "hidden": 0 * average, "counter": np.int32(7)}

    trunk = net.trunk
    kernel("res_net50/~/initial_conv", trunk.conv1)
    norm("res_net50/~/initial_batchnorm", trunk.bn1, 3)
    for group, layer in enumerate((trunk.layer1, trunk.layer2, trunk.layer3, trunk.layer4)):
        for number, block in enumerate(layer):
            at = f"res_net50/~/block_group_{group}/~/block_{number}/~"
            for i in range(3):
                kernel(f"{at}/conv_{i}", getattr(block, f"conv{i + 1}"))
                norm(f"{at}/batchnorm_{i}", getattr(block, f"bn{i + 1}"), 3)
            if len(block.downsample):
                kernel(f"{at}/shortcut_conv", block.downsample[0])
                norm(f"{at}/shortcut_batchnorm", block.downsample[1], 3)
    for name, head in (("projector", net.projection), ("predictor", net.prediction)):
        kernel(f"{name}/linear", head.fc1)
        norm(f"{name}/batch_norm", head.bn1, 1)
        kernel(f"{name}/linear_1", head.fc2)
    experiment = {"online_params": params, "online_state": state, "target_params": params}
    with path.open("wb") as file:
        pickle.dump({"experiment_state": experiment, "step": 3, "rng": np.zeros(2, np.uint32)}, file, protocol=2)


@pytest.mark.parametrize("devices", [(), (1,)])
def test_a_run_starts_from_it(tmp_path, devices):
    """Catches a kernel that is not turned round, statistics mixed up, and a head that is left out."""
    torch.manual_seed(0)
    ours = method()
    net = ours.nets().online
    for name, values in net.state_dict().items():
        if "tracked" not in name:
            values.copy_(torch.rand_like(values) * 0.2 + 0.1)
    written(net, tmp_path / "theirs.pkl", devices)
    weights = read_weights(tmp_path / "theirs.pkl", unsafe_pickle=True)
    assert weights.layout == layouts.SEMPPL and weights.left == ("experiment_state.target_params",)
    nets = ours.nets()
    ours.start_from(nets, weights)
    theirs, found = net.state_dict(), nets.online.state_dict()
    assert [n for n in theirs if "tracked" not in n and not torch.equal(found[n], theirs[n])] == []
    target = nets.target.state_dict()
    assert all(torch.equal(target[n], theirs[n]) for n in target if "tracked" not in n)


def test_another_network_s_is_refused_in_a_line(tmp_path):
    written(method().nets().online, tmp_path / "theirs.pkl")
    wider = method("encoder.width=2")
    weights = read_weights(tmp_path / "theirs.pkl", unsafe_pickle=True)
    with pytest.raises(WeightsError, match=r"theirs\.pkl: \d+ tensors do not fit \(.*; nothing loaded"):
        wider.start_from(wider.nets(), weights)


def test_code_in_it_does_not_run_unasked(tmp_path):
    """Arrays in a pickle need code to be put together."""
    written(method().nets().online, tmp_path / "theirs.pkl")
    with pytest.raises(WeightsError, match="which can run code: refused"):
        read_weights(tmp_path / "theirs.pkl")
