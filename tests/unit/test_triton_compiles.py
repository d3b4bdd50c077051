"""Every kernel of the CUDA finish compiles, from Triton to machine code, for GPUs that are not there."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

ARCHITECTURES = (80, 90)


def test_every_kernel_compiles(tmp_path):
    """Catches what the interpreter lets pass: types that change in a loop, shapes that do not match, library calls that
    a GPU lacks. In a process of its own, as Triton is told once and for all whether to interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.unit.test_triton_compiles"]
    root = Path(__file__).parents[2]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=240)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout)
    assert set(report["compiled"]) == set(report["kernels"]) and len(report["kernels"]) == 5
    for name, sizes in report["compiled"].items():
        assert set(sizes) == {str(a) for a in ARCHITECTURES} and min(sizes.values()) > 1000, name  # bytes


def main() -> None:
    """Run the finish on CPU tensors with launches that compile for each architecture instead of running; print the
    size of the machine code by kernel and architecture."""
    import numpy as np
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from loaders.finish import triton_cuda
    from loaders.plan import ops
    from loaders.plan.views import CIFAR10, IMAGENET, SIGNED

    pointers = {
        torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32", torch.float16: "*fp16",
        torch.bfloat16: "*bf16",
    }  # fmt: skip
    compiled: dict[str, dict[int, int]] = {}

    def compile_only(kernel, *args, grid, warmup, **kwargs):
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        tensors = {name: value for name, value in given.items() if isinstance(value, torch.Tensor)}
        constants = {name: value for name, value in given.items() if name not in tensors}
        signature = {n: pointers[given[n].dtype] if n in tensors else "constexpr" for n in kernel.arg_names}
        for architecture in ARCHITECTURES:
            target = GPUTarget("cuda", architecture, 32)
            code = triton.compile(ASTSource(kernel, signature, constants), target=target).asm["cubin"]
            compiled.setdefault(kernel.__name__, {})[architecture] = len(code)

    JITFunction.run = compile_only
    flip, affine = ops.Flip(), ops.Affine()
    jitter, tf_jitter = ops.ColourJitter(0.8, 0.8, 0.8, 0.8, 0.2), ops.TfColourJitter(0.8, 0.8, 0.4, 0.8, 0.8, 0.2)
    for chain, size, channels, dtype, pixels in (
        ((flip, jitter, ops.Grayscale(), ops.GaussianBlur()), 224, 3, torch.float16, IMAGENET),
        ((flip, tf_jitter, ops.Solarise(), ops.Equalize()), 96, 3, torch.bfloat16, CIFAR10),
        ((ops.HsvNoise(), ops.GaussianKernelBlur()), 224, 3, torch.float32, SIGNED),
        ((affine, ops.Noise()), 8, 1, torch.float32, SIGNED),
    ):
        crops = torch.zeros((1, size, size, channels), dtype=torch.uint8)
        tables = tuple(op.parameters(np.full((1, op.num_draws), 0.5)) for op in chain)
        triton_cuda.finish(crops, chain, tables, pixels, torch.empty(crops.shape, dtype=dtype))
    kernels = [name for name, value in vars(triton_cuda).items() if name.endswith("_kernel")]
    print(json.dumps({"compiled": compiled, "kernels": kernels}))


if __name__ == "__main__":
    main()
