#!/usr/bin/env bash
# Collectives over gloo add memory, not elements: other strides on another rank mix elements, and a sum of a view writes
# outside of it.
#
# torch 2.13.0 (gloo, CPU): all_reduce and broadcast of a tensor that is contiguous on rank 0 and channels-last on rank 1
# give neither error nor warning, and pair up elements of different places. all_reduce of columns of a matrix
# (`base[:, :3]`) sums the first elements of the storage from the view's start: elements that are no part of the view
# change, and the view's own last ones stay unsummed. all_gather copies and is right.
# Expected: "Tensors must be contiguous", as from all_to_all_single.
# Seen, 2 ranks with equal values, arange(24):
#   layouts differ: on rank 1 all_reduce is right in 2 of 24 elements, broadcast in 2 of 24
#   base[:, :3] of 4 rows of 6: rows 0 and 1 doubled over all 6 columns, rows 2 and 3 not at all
# Exit 1: it no longer behaves so.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/pip" install -q torch==2.13.0 numpy==2.4.6
cat >"$work/show.py" <<'EOF'
import datetime
import sys
import tempfile
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

VALUES = torch.arange(24.0)


def work(rank, store, results):
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=2, timeout=datetime.timedelta(minutes=5)
    )
    image = VALUES.reshape(1, 2, 3, 4)
    other = image.contiguous(memory_format=torch.channels_last)
    total = other.clone() if rank else image.clone()
    dist.all_reduce(total)
    sent = torch.zeros_like(other) if rank else image.clone()
    dist.broadcast(sent, 0)
    base = VALUES.reshape(4, 6).clone()
    dist.all_reduce(base[:, :3])
    gathered = [torch.zeros(1, 2, 3, 4) for _ in range(2)]
    dist.all_gather(gathered, other)
    if rank == 1:
        results["sum"] = int((total == 2 * image).sum())
        results["broadcast"] = int((sent == image).sum())
        results["doubled rows"] = [torch.equal(row, 2 * whole) for row, whole in zip(base, VALUES.reshape(4, 6))]
        results["untouched rows"] = [torch.equal(row, whole) for row, whole in zip(base, VALUES.reshape(4, 6))]
        results["gathered"] = all(torch.equal(one, image) for one in gathered)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    with mp.Manager() as manager, tempfile.TemporaryDirectory() as folder:
        results = manager.dict()
        mp.spawn(work, (f"{folder}/store", results), nprocs=2)
        seen = dict(results)
    print("torch", torch.__version__)
    print(f"layouts differ: {seen['sum']} of 24 elements summed right, {seen['broadcast']} of 24 broadcast right")
    print(f"columns: rows doubled whole {seen['doubled rows']}, rows untouched {seen['untouched rows']}")
    print(f"all_gather right: {seen['gathered']}")
    mixed = seen["sum"] < 24 and seen["broadcast"] < 24 and seen["gathered"]
    outside = seen["doubled rows"] == [True, True, False, False] and seen["untouched rows"] == [False, False, True, True]
    sys.exit(not (mixed and outside))
EOF
OMP_NUM_THREADS=1 "$work/venv/bin/python" "$work/show.py"
