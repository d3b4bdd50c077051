#!/usr/bin/env bash
# The same weights and the same metadata give another file in every process.
#
# safetensors 0.8.0: tensors are sorted, but the metadata's entries are written in an order that each process draws anew.
# With two entries or more (a recipe, a commit, a step) the bytes differ from save to save, so hashes of a file
# neither prove that two runs ended alike nor find a file that is already stored. Without metadata, or with one entry,
# the bytes repeat. Put everything into one entry, as JSON, or hash the tensors.
# Expected: equal bytes.
# Seen: five processes, eight entries: five hashes; one entry: one hash.
# Exit 1: it no longer behaves so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q safetensors==0.8.0 numpy==2.4.6
cat >"$work/show.py" <<'EOF'
import hashlib
import sys
import numpy as np
from safetensors.numpy import save

metadata = {f"key{k}": str(k) for k in range(int(sys.argv[1]))}
print(hashlib.sha256(save({"a": np.zeros(2), "b": np.ones(3)}, metadata=metadata)).hexdigest()[:16])
EOF
hashes() { for _ in 1 2 3 4 5; do "$work/venv/bin/python" "$work/show.py" "$1"; done | sort -u | wc -l; }
many=$(hashes 8)
one=$(hashes 1)
echo "safetensors 0.8.0: five saves of eight entries: $many hashes; of one entry: $one"
[ "$many" -gt 1 ] && [ "$one" -eq 1 ]
