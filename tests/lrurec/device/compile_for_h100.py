"""Compiles every kernel for compute capability 9.0, down to machine code, as it is launched on a model with d = 64."""

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from lrurec.device import triton_kernels
from lrurec.device.triton_operators import TILE

FLOATS, INTS = "*fp32", "*i32"
H100 = GPUTarget("cuda", 90, 32)


def assembly(kernel, types, constants, warps):
    """The PTX; that there is machine code too, ptxas has said."""
    names = dict.fromkeys(constants, "constexpr")
    signature = dict(zip(kernel.arg_names, [*types, *names.values()], strict=True))
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
    compiled = triton.compile(source, target=H100, options={"num_warps": warps, "enable_fp_fusion": True})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]


for stored in ("*fp16", "*fp32"):
    assembly(
        triton_kernels.recur,
        [FLOATS, stored, stored, FLOATS, INTS, INTS, "i32", "i32", "i32", "fp32"],
        {"block": 128},
        warps=4,
    )
for places in (16, 128):
    scoring = assembly(
        triton_kernels.best_of_run,
        [FLOATS, FLOATS, FLOATS, INTS, INTS, FLOATS, INTS, *["i32"] * 7],
        {**TILE, "places": places},
        warps=8,
    )
    assert "tf32" not in scoring
    assert "fma.rn.f32" in scoring
