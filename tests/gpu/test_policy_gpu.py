"""policy_loss on a GPU, every implementation asked for by name: values, the same bits, launches that do not
wait or compile again.
"""

from __future__ import annotations

from itertools import cycle

import policy
import pytest
import torch
import torch._dynamo.testing
from policy import ALL_KLS, SWITCHES, case, fused, judge, numbers, variant
from support import no_waiting

from fastrl import ops
from fastrl.kernels._backend import COMPILED_ONLY
from fastrl.kernels.policy_loss import RATIOS, SURROGATES, policy_loss

pytestmark = pytest.mark.gpu


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    state = ops.implementations()["policy_loss"].get(request.param, "not written")
    if state not in ("ready", COMPILED_ONLY):
        pytest.skip(f"policy_loss: {request.param}: {state}")
    return request.param


@pytest.mark.parametrize("ratio", RATIOS)
@pytest.mark.parametrize("name", SURROGATES)
def test_every_row_with_every_kl(backend, name, ratio):
    """Wrong: what the interpreter cannot show: exponentials of too few bits, divisions that round otherwise,
    fused products.
    """
    given = case(20011, device="cuda")
    for kl, switches in zip(ALL_KLS, cycle(SWITCHES), strict=False):
        judge(backend, variant(given, name, ratio, kl, switches))


@pytest.mark.parametrize("T", [1, 511, 512, 513, 70001, 4_194_304])
def test_sizes(backend, T):
    """Wrong: a rest that is dropped, programs that take a block twice, a sum that drifts over four million
    tokens.
    """
    judge(backend, variant(case(T, device="cuda"), "clip", "sequence", "k3"))


def test_70000_sequences(backend):
    """Wrong: sequences on a grid axis that ends at 65,535."""
    given = variant(case(140_000, spread=0.05, device="cuda"), "clip", "sequence", None)
    judge(backend, given | {"cu_seqlens": torch.arange(0, 140_001, 2, device="cuda")})


def test_k3_of_a_small_step():
    """Wrong: exp2 of a product, whose result near 1 has no digit of exp(d) - 1 - d."""
    policy.k3_of_a_small_step("triton", "cuda")


def test_the_first_step_is_exact(backend):
    """Wrong: a division of 1 by 2 that is not a half: at old_logp = logp every derivative is the advantage,
    to the bit.
    """
    x = case(5000, device="cuda")
    slopes = []
    for name in (n for n in SURROGATES if n not in ("nll", "luffy_off")):
        given = variant(x | {"old_logp": x["logp"]}, name, "token", None, ("mask",))
        slopes.append(fused(backend, given)[2][0])
    assert all(torch.equal(s, slopes[0]) for s in slopes)


def test_a_hundred_runs_give_the_same_bits(backend):
    """Wrong: atomics, or a second stage that adds in the order in which programs end."""
    given = variant(case(1_000_003, device="cuda"), "clip", "sequence", "k3")
    first = numbers(fused(backend, given))
    assert all(torch.equal(numbers(fused(backend, given)), first) for _ in range(100))


@pytest.mark.parametrize("ratio", RATIOS)
def test_nothing_waits_for_the_device(backend, ratio):
    given = variant(case(5000, device="cuda"), "clip", ratio, "k3")
    fused(backend, given)  # compiles
    with no_waiting():
        fused(backend, given)


def test_no_length_compiles_a_kernel_again():
    """Wrong: T specialized for 1 or for multiples of 16; coefficients or parameters as constants."""
    kernels = pytest.importorskip("fastrl.kernels._triton.policy_loss", exc_type=ImportError)
    fused("triton", variant(case(1000, device="cuda"), "clip", "token", "k3"))
    before = sum(len(entry[0]) for entry in kernels.token_kernel.device_caches.values())
    for T in (1, 16, 999, 4096):
        row = SURROGATES["clip"].with_params(low=0.1 + 1e-5 * T)
        fused("triton", variant(case(T, device="cuda"), row, "token", "k3") | {"kl_coef": 1e-3 * T})
    assert sum(len(entry[0]) for entry in kernels.token_kernel.device_caches.values()) == before


def test_under_compile(backend):
    """Wrong: an op that torch.compile looks into, or compiles again for each number of tokens."""
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    torch._dynamo.reset()

    def loss(p, given):
        return policy_loss(p * 1.0, surrogate="clip", kl="k3", kl_coef=0.1, entropy_coef=0.1, **given)[0]

    compiled = torch.compile(loss, fullgraph=True, backend=counter, dynamic=True)
    for T in (64, 100, 1000):
        given = {n: x for n, x in case(T, device="cuda").items() if n != "cu_seqlens"}
        leaves = [given["logp"].clone().requires_grad_() for _ in range(2)]
        del given["logp"]
        with ops.use_backend(backend, "policy_loss"):
            for f, leaf in zip((compiled, loss), leaves, strict=True):
                f(leaf, given).backward()
        torch.testing.assert_close(leaves[0].grad, leaves[1].grad)
    assert counter.frame_count == 1
