"""perturb on a GPU, each implementation asked for by name: values, repeatability, launches that do not wait,
size.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from perturbations import BALLS, RADIUS
from support import no_waiting, within_budget

from fastrl import ops
from fastrl.kernels._backend import COMPILED_ONLY

pytestmark = pytest.mark.gpu
GIB = 2**30
balls = pytest.mark.parametrize(("norm", "scope"), BALLS)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    state = ops.implementations()["perturb_step"].get(request.param, "not written")
    if state not in ("ready", COMPILED_ONLY):
        pytest.skip(f"perturb_step: {request.param}: {state}")
    with ops.use_backend(request.param, "perturb_step", "perturb_init"):
        yield request.param


def case(T, D, norm, scope, dtype=torch.float32, S=7):
    """delta, grad and the rest: packed sequences of uneven lengths, a tenth of the tokens masked, a token not
    finite.
    """
    grad = torch.randn(T, D, device="cuda").to(dtype)
    grad[T // 2, D // 2] = torch.inf
    ends = torch.rand(S - 1, device="cuda").mul(T).int().sort().values
    edge = torch.zeros(1, dtype=torch.int32, device="cuda")
    how = {"norm": norm, "scope": scope, "mask": torch.rand(T, device="cuda") > 0.1}
    if scope == "sequence":
        how["cu_seqlens"] = torch.cat([edge, ends, edge + T])
    return 0.1 * torch.randn(T, D, device="cuda"), grad, how


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("T", "D"), [(1, 1), (300, 1000), (3000, 896), (500, 4096), (40, 20000), (70000, 24)]
)
@balls
def test_values(backend, norm, scope, T, D, dtype):
    """Wrong: what the interpreter cannot show: reductions across warps, in-place rows, rows that do not fit
    the registers.
    """
    delta, grad, how = case(T, D, norm, scope, dtype)
    how |= {"step_size": 0.3, "radius": RADIUS[norm]}
    with ops.use_backend("reference", "perturb_step"):
        exact = ops.perturb_step(delta.double(), grad.double(), **how)
        theirs = ops.perturb_step(delta.clone(), grad, **how)
    embeds, out = torch.randn(T, D, device="cuda").to(dtype), torch.empty(T, D, device="cuda")
    ours = ops.perturb_step(delta.clone(), grad, embeds=embeds, out=out, **how)
    within_budget(ours, theirs, exact)
    assert torch.equal(out, embeds.float() + ours) and not ours[~how["mask"]].any()
    assert torch.equal(ours, ops.perturb_step(delta.clone(), grad, **how))


@balls
def test_start_has_the_bits_of_the_cpu(backend, norm, scope):
    """Wrong: fp64 that rounds otherwise than IEEE division and root, words of another counter."""
    for T, D in ((9, 7), (500, 896)):
        *_, how = case(T, D, norm, scope)
        here = ops.perturb_init(torch.empty(T, D, device="cuda"), radius=0.7, seed=2**40 + 3, **how)
        there = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in how.items()}
        with ops.use_backend("reference", "perturb_init"):
            assert torch.equal(
                here.cpu(), ops.perturb_init(torch.empty(T, D), radius=0.7, seed=2**40 + 3, **there)
            )


@balls
def test_in_place_a_hundred_times(backend, norm, scope):
    """Wrong: a warp that stores a row which another warp has yet to load."""
    delta, grad, how = case(600, 4096, norm, scope)
    how |= {"step_size": 0.3, "radius": RADIUS[norm]}
    want = ops.perturb_step(delta.clone(), grad, **how)
    for _ in range(100):
        assert torch.equal(ops.perturb_step(delta.clone(), grad, **how), want)


@balls
def test_nothing_waits_for_the_device(backend, norm, scope):
    delta, grad, how = case(300, 256, norm, scope)

    def attack():
        start = ops.perturb_init(delta, radius=0.5, seed=1, **how)
        ops.perturb_step(start, grad, step_size=0.1, radius=0.5, **how)

    attack()  # compiles
    with no_waiting():
        attack()


def test_more_than_2_31_elements(backend):
    """Wrong: offsets in int32.  The last tokens are compared with a call of their own."""
    T, D = 2**19 + 64, 4096
    free, _ = torch.cuda.mem_get_info()
    if backend == "reference" or free < 20 * GIB:
        pytest.skip(f"needs 20 GiB of free GPU memory, there are {free / GIB:.1f}")
    delta = torch.zeros(T, D, device="cuda")
    grad = torch.empty(T, D, dtype=torch.bfloat16, device="cuda").normal_()
    want = ops.perturb_step(torch.zeros(64, D, device="cuda"), grad[-64:].clone(), step_size=0.3, radius=0.2)
    assert torch.equal(ops.perturb_step(delta, grad, step_size=0.3, radius=0.2)[-64:], want)
    cu = torch.tensor([0, T - 64, T], dtype=torch.int32, device="cuda")
    want = ops.perturb_step(
        torch.zeros(1, 64, D, device="cuda"),
        grad[None, -64:].clone(),
        step_size=0.3,
        radius=0.2,
        scope="sequence",
    )
    delta.zero_()
    ours = ops.perturb_step(delta, grad, step_size=0.3, radius=0.2, scope="sequence", cu_seqlens=cu)
    torch.testing.assert_close(ours[-64:], want[0], atol=1e-9, rtol=1e-6)


def test_under_compile(backend):
    """Wrong: an op that torch.compile looks into, or compiles again for each number of tokens."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")

    def attack(x, g):
        delta = ops.perturb_init(x, radius=0.5, norm="l2", scope="batch", seed=1)
        out = torch.empty_like(x)
        ops.perturb_step(delta, g, step_size=0.1, radius=0.5, scope="batch", embeds=x, out=out)
        return out + 0

    torch._dynamo.reset()
    compiled = torch.compile(attack, fullgraph=True, backend=counter, dynamic=True)
    for T in (16, 24, 40):
        x, g = torch.randn(T, 64, device="cuda"), torch.randn(T, 64, device="cuda")
        torch.testing.assert_close(compiled(x, g), attack(x, g))
    assert counter.frame_count == 1
