#!/usr/bin/env bash
# torch's FLOP counter takes a grouped convolution's weight gradient for an ungrouped one's: backward is 1 + groups times
# forward, in place of twice.
#
# torch 2.13.0 (CPU), torch.utils.flop_counter.FlopCounterMode: the forward count and that of the input's gradient are
# divided by the groups, the count of the weight's gradient is not. A depthwise convolution of 64 channels, where groups
# are channels, counts 22 times what a training step computes (1 + 65 for 1 + 2), EfficientNet-B0 as a whole 13 times.
# Expected: backward = 2 x forward for any number of groups, as for groups=1.
# Seen, 64 to 64 channels, 3 x 3, 16 x 16 pixels, batch 2: backward / forward 2.0 for 1 group, 5.0 for 4, 65.0 for 64
# Exit 1: it no longer counts so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$work/show.py" <<'EOF'
import sys
import torch
from torch.utils.flop_counter import FlopCounterMode


def counted(work):
    with FlopCounterMode(display=False) as counter:
        result = work()
    return counter.get_total_flops(), result


print("torch", torch.__version__)
as_seen = True
x = torch.randn(2, 64, 16, 16, requires_grad=True)
for groups in (1, 4, 64):
    conv = torch.nn.Conv2d(64, 64, 3, padding=1, groups=groups, bias=False)
    forward, y = counted(lambda: conv(x))
    backward, _ = counted(lambda: y.sum().backward())
    computed = 2 * 2 * 16 * 16 * 64 * (64 // groups) * 9  # 2 x images x pixels x outputs x inputs of a group x taps
    print(f"{groups} groups: forward {forward:,} (computed {computed:,}), backward / forward {backward / forward}")
    as_seen &= forward == computed and backward == (1 + groups) * forward
sys.exit(not as_seen)
EOF
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/show.py"
