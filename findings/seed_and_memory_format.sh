#!/usr/bin/env bash
# One seed, other weights: a normal draw into a channels-last tensor takes other numbers, not the same ones elsewhere.
#
# torch 2.13.0 (CPU): with one seed, uniform_, bernoulli_ and dropout give a channels-last tensor the numbers that a
# contiguous one gets, in the order of memory: the same values in other places. normal_ (so kaiming_normal_,
# trunc_normal_ and randn_like) gives it other values altogether, for it takes another algorithm where a tensor is not
# contiguous. `.to(memory_format=torch.channels_last)` before or after initialising is thus another network.
# Expected: for all of them the same values, in the order of memory.
# Seen: share of equal values after sorting: uniform_, bernoulli_, dropout 1; normal_, kaiming_normal_, trunc_normal_,
#   randn_like below 0.05
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

MOVED = {
    "uniform_": lambda w: w.uniform_(),
    "bernoulli_": lambda w: w.bernoulli_(0.5),
    "dropout": lambda w: nn.functional.dropout(torch.ones_like(w), 0.5),
}
OTHER = {
    "normal_": lambda w: w.normal_(),
    "kaiming_normal_": nn.init.kaiming_normal_,
    "trunc_normal_": nn.init.trunc_normal_,
    "randn_like": torch.randn_like,
}


def drawn(draw, memory_format):
    torch.manual_seed(1)
    return draw(torch.empty(8, 4, 3, 3).to(memory_format=memory_format))


def equal_shares(draw):
    plain, last = (drawn(draw, form) for form in (torch.contiguous_format, torch.channels_last))
    in_place = (plain == last).float().mean().item()
    moved = (plain.flatten() == last.permute(0, 2, 3, 1).flatten()).float().mean().item()
    return in_place, moved, (plain.flatten().sort()[0] == last.flatten().sort()[0]).float().mean().item()


print("torch", torch.__version__)
as_seen = True
for name, draw in (MOVED | OTHER).items():
    in_place, moved, values = equal_shares(draw)
    print(f"{name}: equal in place {in_place:.2f}, in order of memory {moved:.2f}, as a set {values:.2f}")
    as_seen &= in_place < 1 and (moved == values == 1 if name in MOVED else values < 0.05)
sys.exit(not as_seen)
EOF
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/show.py"
