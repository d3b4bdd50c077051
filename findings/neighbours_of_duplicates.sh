#!/usr/bin/env bash
# Among exact duplicates the nearest neighbour of a training row is not itself, and ties come in no order.
#
# scikit-learn 1.9.1, numpy 2.4.6: NearestNeighbors(algorithm="brute") over 500 rows that stand three times in the index.
# Distances of exactly 0 (metric "manhattan") come out in the orders (2, 0, 1) and (2, 1, 0) of the copies: the first
# neighbour of a row is itself for a third of the rows. "euclidean" gives exact copies distances of up to 5e-8, not 0,
# and ranks by that rounding. Leave-one-out that drops the first column drops another image, and keeps the query itself
# with its label, for two thirds of the rows: k-NN numbers of sets with duplicates are too good.
# kneighbors() without an argument leaves the row itself out, and is right.
# Expected: ties by index, so that each first copy finds itself first, then the second and the third.
# Seen: rows that find themselves first: manhattan 0.333, euclidean 0.333
# Exit 1: it no longer behaves so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q scikit-learn==1.9.1 numpy==2.4.6
cat >"$work/show.py" <<'EOF'
import sys
import numpy as np
import sklearn
from sklearn.neighbors import NearestNeighbors

rng = np.random.default_rng(0)
rows = rng.normal(size=(500, 128)).astype(np.float32)
rows /= np.linalg.norm(rows, axis=1, keepdims=True)
index = np.concatenate([rows, rows, rows])
print("scikit-learn", sklearn.__version__)
as_seen = True
for metric in ("manhattan", "euclidean"):
    search = NearestNeighbors(n_neighbors=3, algorithm="brute", metric=metric).fit(index)
    distances, found = search.kneighbors(index)
    assert (found % 500 == (np.arange(1500) % 500)[:, None]).all()  # the three copies, in some order
    own = (found[:, 0] == np.arange(1500)).mean()
    orders = sorted({tuple((row // 500).tolist()) for row in found})
    left_out = search.kneighbors(n_neighbors=2)[1]
    print(f"{metric}: itself first {own:.3f}, orders {orders}, largest distance {distances.max():.1e}")
    as_seen &= own < 0.6 and not (left_out == np.arange(1500)[:, None]).any()
    as_seen &= distances.max() == 0 if metric == "manhattan" else 0 < distances.max() < 1e-6
sys.exit(not as_seen)
EOF
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/show.py"
