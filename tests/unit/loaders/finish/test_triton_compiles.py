"""Every Triton kernel compiles to machine code for GPUs that are not there, and what it needs of them is held."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ARCHITECTURES = (80, 90, 100)
GOLDEN = Path(__file__).parents[3] / "golden" / "kernels.json"


@pytest.mark.timeout(600)
def test_every_kernel_compiles(tmp_path):
    """Catches what the interpreter lets pass: types that change in a loop, shapes that do not match, library calls that
    a GPU lacks. In a process of its own, as Triton is told once and for all whether to interpret."""
    environment = {**os.environ, "TRITON_CACHE_DIR": str(tmp_path)}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-m", "tests.unit.loaders.finish.test_triton_compiles"]
    root = Path(__file__).parents[4]
    ran = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=root, timeout=570)
    assert ran.returncode == 0, ran.stderr[-3000:]
    report = json.loads(ran.stdout)
    assert set(report["compiled"]) == set(report["kernels"]) and len(report["kernels"]) == 5 + 6 + 2
    for name, sizes in report["compiled"].items():
        assert set(sizes) == {str(a) for a in ARCHITECTURES} and min(sizes.values()) > 1000, name  # bytes
    assert report["faults"] == []
    held_to_golden(report["table"], report["triton"])


def held_to_golden(table: dict[str, dict[str, dict[str, Any]]], triton: str) -> None:
    """Nothing spills; every kernel lets half of a multiprocessor's warps live at once, and moves numbers of an aligned
    tensor 16 bytes at a time, but for the finish's interleaved bytes and pixels, of which three channels make no power
    of two. What the golden table says is said of the Triton that made it, and holds for each kernel it names.

    Catches a change, of a kernel or of what it is called with, that costs registers, memory or wide moves."""
    for kernel, by_architecture in table.items():
        for architecture, row in by_architecture.items():
            where = f"{kernel} on {architecture}: {row}"
            assert row["spills"] == 0, where
            assert row["occupancy"] >= 0.5, where
            if kernel.startswith(("_normalise", "_input_gradient", "_statistics", "_gradient_sums")):
                assert set(row["loads"]) == {"16"}, where
            if kernel.startswith(("_normalise", "_input_gradient")):
                assert set(row["stores"]) == {"16"}, where
    golden = json.loads(GOLDEN.read_text())
    if os.environ.get("FASTSSL_WRITE_GOLDEN"):
        GOLDEN.write_text(json.dumps({"triton": triton, "table": table}, indent=1) + "\n")
    elif golden["triton"] == triton:
        assert table == golden["table"]
    else:
        assert set(table) == set(golden["table"])


def faults(kernel: str, ptx: str, ttir: str) -> list[str]:
    """What would cost batch norm's and LARS's kernels their speed, their determinism or their largest tensors."""
    found = []
    if "align 16" in kernel and not re.search(r"\bld\.global\S*\.v4\b", ptx):
        found.append(f"{kernel} moves floats one by one, not four at a time")
    if re.search(r"\b(ld|st)\.global\S*\.b16\b", ptx):
        found.append(f"{kernel} moves half-precision numbers one by one, not 16 bytes at a time")
    if re.search(r"\b(atom|red)\.", ptx):
        found.append(f"{kernel} adds in whichever order programs end")
    if "num_rows" in ttir and not re.search(r"arith\.muli .*i64", ttir):
        found.append(f"{kernel} has no offset beyond 2**31")
    return found


def test_faults_would_be_noticed():
    assert len(faults("k", "ld.global.b16 {%rs1}; red.global.add.f32", "%num_rows: i32")) == 3
    assert len(faults("k, align 16", "ld.global.b32 {%r1};", "")) == 1 and faults("k", "ld.global.b32 {%r1};", "") == []
    assert faults("k", "@%p1 ld.global.v4.b32 {%r1};", "%num_rows: i32 arith.muli %1, %2 : i64") == []


def main() -> None:
    """Call on CPU tensors what launches kernels, with launches that compile for each architecture instead of running;
    print the size of the machine code by kernel and architecture, and what `faults` finds."""
    import numpy as np
    import torch
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource
    from triton.runtime.jit import JITFunction

    from fastssl.nn.norm import triton_kernels
    from fastssl.optim import lars_triton
    from loaders.finish.triton import finish as triton_finish
    from loaders.finish.triton import passes
    from loaders.plan import ops
    from loaders.plan.views import CIFAR10, IMAGENET, SIGNED
    from tools.kernels import table

    pointers = {
        torch.uint8: "*u8", torch.int32: "*i32", torch.float32: "*fp32", torch.float16: "*fp16",
        torch.bfloat16: "*bf16", torch.int64: "*i64",
    }  # fmt: skip
    compiled: dict[str, dict[int, int]] = {}
    rows: dict[str, dict[str, Any]] = {}
    found: list[str] = []

    def compile_only(kernel, *args, grid, warmup, num_warps=4, maxnreg=None, **kwargs):
        given = {**dict(zip(kernel.arg_names, args, strict=False)), **kwargs}
        signature, constants, attributes = {}, {}, {}
        for place, parameter in enumerate(kernel.params):
            name, value = parameter.name, given[parameter.name]
            if isinstance(value, torch.Tensor):
                signature[name] = pointers[value.dtype]
            elif isinstance(value, float) and not parameter.is_constexpr:
                signature[name] = "fp32"
            elif parameter.is_constexpr or not isinstance(value, int):
                signature[name], constants[name] = "constexpr", value
            else:
                signature[name] = "i32"
            # as at a launch: torch's memory begins at multiples of 16
            divides = isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0)
            if name not in constants and divides and not parameter.do_not_specialize:
                attributes[(place,)] = [["tt.divisibility", 16]]
        types = "-".join(t.removeprefix("*") for t in signature.values() if t.startswith("*"))
        key = name = f"{kernel.__name__} {types} {constants.get('ALIGN', '')}".strip()
        while key in rows:
            key = f"{name} #{int(key.partition('#')[2] or 1) + 1}"
        rows[key] = {}
        for architecture in ARCHITECTURES:
            source, target = ASTSource(kernel, signature, constants, attributes), GPUTarget("cuda", architecture, 32)
            code = triton.compile(source, target=target, options={"num_warps": num_warps, "maxnreg": maxnreg})
            compiled.setdefault(kernel.__name__, {})[architecture] = len(code.asm["cubin"])
            rows[key][f"sm_{architecture}"] = table(code, architecture)
            if hasattr(triton_kernels, kernel.__name__) or hasattr(lars_triton, kernel.__name__):
                variant = f"{kernel.__name__} on sm_{architecture}, align {constants.get('ALIGN')}"
                found.extend(faults(variant, code.asm["ptx"], code.asm["ttir"]))

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
        triton_finish.finish(crops, chain, tables, pixels, torch.empty(crops.shape, dtype=dtype))
    per_channel = torch.zeros(64)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        x = torch.zeros((2, 64, 16, 16), dtype=dtype).contiguous(memory_format=torch.channels_last)
        triton_kernels.statistics(x)
        triton_kernels.normalise(x, per_channel, per_channel, x, relu=True)
        for mask in (None, x, (per_channel, per_channel)):
            triton_kernels.gradient_sums(x, mask, x, per_channel, per_channel)
            triton_kernels.input_gradient(x, mask, x, per_channel, per_channel, per_channel, residual_gradient=True)
    number = torch.zeros(())
    for size, form in ((64, "paws"), (64, "simclr"), (64, "byol"), (63, "paws")):  # 63: nothing wide
        p = torch.nn.Parameter(torch.zeros(size))
        p.grad = torch.zeros(size)
        step = lars_triton.Fused([[p]]).step
        settings = {"lr": 0.1, "momentum": 0.9, "weight_decay": 1e-6, "trust_coefficient": 0.001, "eps": 1e-8}
        step([{**settings, "form": form, "lars_exclude": False}], number, number)
        step([{**settings, "form": form, "lars_exclude": True}], None, None)
    modules = (passes, triton_kernels, lars_triton)
    kernels = [name for module in modules for name in vars(module) if name.endswith("_kernel")]
    print(
        json.dumps(
            {"compiled": compiled, "kernels": kernels, "faults": found, "table": rows, "triton": triton.__version__}
        )
    )


if __name__ == "__main__":
    main()
