"""Launches without a GPU are those a GPU would get: what they compile, their grid and arguments; and nothing
of it is left afterwards.
"""

from __future__ import annotations

import pytest
from compiled import beside, facts

from fastrl.errors import UserError

pytest.importorskip("triton.backends.nvidia", reason="triton is not installed")
from fastrl.bench import offline

SCRIPT = """
import json, torch, triton
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction
from fastrl import ops
from fastrl.bench import offline
from fastrl.kernels import _backend, _launch
from fastrl.kernels._triton import token_logp as kernels

def state():
    table = [(op, i["triton"].devices) for op, i in sorted(_backend._table.items()) if "triton" in i]
    return JITFunction.run, JITFunction._do_compile, driver._active, list(_launch.stand_ins), table

def call(V, T=4):
    x = torch.zeros(T, V, requires_grad=True)
    return x, ops.token_logp(x, torch.zeros(T, dtype=torch.long))

before, out = state(), {"version": triton.__version__}

with offline.recorded(90) as seen, ops.use_backend("triton"):
    x, (logp, _, _) = call(4096)
    logp.sum().backward()
    call(50257)
out["names"] = [launch.name for launch in seen]
out["grids"] = [launch.grid for launch in seen]
out["same storage"] = seen[0].arguments["logits"].data_ptr() == x.data_ptr()
out["V"] = [launch.arguments["V"] for launch in seen]
at = list(seen[0].arguments).index("V")
out["V is a multiple of 16"] = [bool(launch.attributes.get((at,))) for launch in seen]
out["warps"] = [launch.options["num_warps"] for launch in seen]

# Triton's own way to the compiled kernel, with the same driver
run = JITFunction.run
stub = offline._Stub(90)
stub.get_current_device = lambda: 0
driver.set_active(stub)
first = seen[0]
own = run(first.kernel, **first.arguments, grid=first.grid, warmup=True, **first.options)
driver._active = before[2]
out["same code"] = own.hash == first.compile().hash
out["compiled once"] = first.compile() is first.compile()

out["target"] = {}
for arch in (80, 90, 100):
    with offline.recorded(arch) as seen, ops.use_backend("triton"):
        call(4096)
    out["target"][arch] = [w for w in seen[0].compile().asm["ptx"].split() if w.startswith("sm_")][0]

out["tiles"] = {}
from fastrl.kernels._triton import linear_logp
h, w = torch.zeros(8, 64).bfloat16(), torch.zeros(512, 64).bfloat16()
y, tau = torch.zeros(8).long(), torch.ones(8)
for arch in (90, 100):
    with offline.recorded(arch) as seen:
        linear_logp.forward(h, w, y, None, tau, True)
    tiled = next(launch for launch in seen if launch.name.endswith(".partial"))
    out["tiles"][arch] = tiled.name
    out["tile dtype"] = tiled.signature["hidden"]

try:
    with offline.recorded(90):
        raise KeyError
except KeyError:
    pass
out["restored"] = state() == before
try:
    with ops.use_backend("triton"):
        call(64)
except RuntimeError as error:
    out["afterwards"] = str(error)
print(json.dumps(out))
"""


@pytest.fixture(scope="module", params=["", "3.6.0", "3.7.1"])
def found(request):
    if request.param and beside(request.param) is None:
        pytest.skip(f"Triton {request.param} is not installed beside: make .triton/{request.param}")
    return request.param, facts(SCRIPT, request.param)


def test_a_launch_is_what_triton_would_compile(found):
    version, seen = found
    assert not version or seen["version"] == version
    # a hook that drops the specialisation of sizes compiles other code than the launch
    assert seen["same code"] and seen["compiled once"]
    assert seen["V is a multiple of 16"] == [True, True, False]
    assert seen["target"] == {"80": "sm_80", "90": "sm_90a", "100": "sm_100a"}


def test_a_launch_has_its_grid_arguments_and_options(found):
    _, seen = found
    assert seen["names"] == ["token_logp.forward", "token_logp.backward", "token_logp.forward"]
    assert seen["grids"] == [[4, 1, 1]] * 3  # the backward pass is recorded, too
    assert seen["V"] == [4096, 4096, 50257]
    assert seen["warps"] == [8] * 3
    assert seen["same storage"]  # not a copy: who runs the code writes into the caller's tensors


def test_the_gpu_decides_as_it_does_in_a_launch(found):
    _, seen = found
    # specialised warps need the tensor cores of sm_90
    assert seen["tiles"] == {"90": "linear_logp_hopper.partial", "100": "linear_logp.partial"}
    assert seen["tile dtype"].startswith("tensordesc<bf16")  # the interpreter's fp32 copy is not taken


def test_nothing_is_left_afterwards(found):
    _, seen = found
    assert seen["restored"]
    assert "does not run on cpu tensors" in seen["afterwards"]


def test_the_interpreter_is_refused():
    with pytest.raises(UserError, match="TRITON_INTERPRET"), offline.recorded(90):
        pass


def test_an_unknown_gpu_is_refused():
    with pytest.raises(ValueError, match="arch: expected one of 80, 90, 100; got 75"), offline.recorded(75):
        pass
