#!/usr/bin/env bash
# Reading an optimiser's state for a distributed checkpoint changes the optimiser, and a state that it gave may not load.
#
# torch 2.13.0, torch.distributed.checkpoint.state_dict:
# 1. get_optimizer_state_dict of an optimiser that has not stepped yet takes a step at rate 0 with zero gradients and
#    leaves what that made. SGD with momentum and weight decay keeps weight_decay * weights in its momentum: the first
#    real step moves the weights by it. AdamW counts step 1: its first real step corrects its bias as a second one and is
#    about a quarter too short.
# 2. Where only some parameters have had gradients (a last layer kept still in the first epoch, by grad = None), the
#    state that get_optimizer_state_dict gives is refused by set_optimizer_state_dict on the same model.
# Expected: reading changes nothing, momentum is zero; what was got can be set.
# Seen: SGD's first step (rate 0.1, momentum 0.9, weight decay 0.1) of weights 1 with zero gradients moves 0.019 in place
#   of 0.010; AdamW's first step (rate 0.1) moves 0.0744 in place of 0.1; RuntimeError "Missing optimizer state for parameter".
# Exit 1: it no longer behaves so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$work/show.py" <<'EOF'
import sys
import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict


def first_step(make, gradient, looked_at):
    model = nn.Linear(3, 1, bias=False)
    nn.init.ones_(model.weight)
    optimizer = make(model.parameters())
    if looked_at:
        get_optimizer_state_dict(model, optimizer)
        assert torch.equal(model.weight, torch.ones(1, 3))
    model.weight.grad = torch.full((1, 3), gradient)
    optimizer.step()
    return (1 - model.weight[0, 0]).item()


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9, weight_decay=0.1)


def adamw(params):
    return torch.optim.AdamW(params, lr=0.1, weight_decay=0.0)


def refused():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = adamw(model.parameters())
    model[0](torch.ones(1, 2)).sum().backward()
    optimizer.step()
    try:
        set_optimizer_state_dict(model, optimizer, get_optimizer_state_dict(model, optimizer))
    except RuntimeError as error:
        return "Missing optimizer state for parameter" in str(error)
    return False


print("torch", torch.__version__)
plain_sgd, looked_sgd = (first_step(sgd, 0.0, looked_at) for looked_at in (False, True))
plain_adamw, looked_adamw = (first_step(adamw, 1.0, looked_at) for looked_at in (False, True))
not_loaded = refused()
print(f"sgd: first step {plain_sgd:.4f}, after reading the state {looked_sgd:.4f}")
print(f"adamw: first step {plain_adamw:.4f}, after reading the state {looked_adamw:.4f}")
print(f"state of a partly trained model refused: {not_loaded}")
sgd_as_seen = abs(plain_sgd - 0.01) < 1e-5 and abs(looked_sgd - 0.019) < 1e-5
adamw_as_seen = abs(plain_adamw - 0.1) < 1e-4 and abs(looked_adamw - 0.0744) < 5e-4
sys.exit(not (sgd_as_seen and adamw_as_seen and not_loaded))
EOF
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/show.py"
