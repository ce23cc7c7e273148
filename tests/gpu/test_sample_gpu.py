"""sample on a GPU, every implementation asked for by name: values, repeatability, launches that do not wait,
graphs, size.
"""

from __future__ import annotations

import pytest
import torch
import torch._dynamo.testing
from support import no_waiting

from fastrl import ops
from fastrl.kernels._backend import COMPILED_ONLY
from fastrl.kernels.sample import forward_op, sample

pytestmark = pytest.mark.gpu
FILTERS = [{}, {"top_k": 50}, {"top_p": 0.9}, {"top_k": 40, "top_p": 0.8, "min_p": 0.01}]
OFF = (0, 1.0, 0.0)


@pytest.fixture(params=["reference", "triton"])
def backend(request):
    state = ops.implementations()["sample"].get(request.param, "not written")
    if state not in ("ready", COMPILED_ONLY):
        pytest.skip(f"sample: {request.param}: {state}")
    with ops.use_backend(request.param, "sample"):
        yield request.param


def keys(B):
    def ids(high):
        return torch.randint(high, (B,), device="cuda")

    return {"seed": ids(2**62), "sequence": ids(2**62), "position": ids(2**32)}


def defined(logits, key, **options):
    """The definition, in float64."""
    with ops.use_backend("reference", "sample"):
        return sample(logits.double(), **key, **options)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("V", [7, 1000, 32000, 50257, 151936, 152064])
def test_values(backend, V, dtype, filters):
    """Wrong: approximate logarithms in the noise, a division that is not rounded to nearest in front of a
    floor, a shuffled word.

    fp32 and float64 may round the best two, or a tie, apart: 1 row in 64 may differ; the numbers of all
    others may not.
    """
    B = 64
    logits, key = (2 * torch.randn(B, V, device="cuda")).to(dtype), keys(B)
    tau = torch.where(torch.arange(B, device="cuda") % 8 == 0, 0.0, torch.rand(B, device="cuda") + 0.5)
    ours, right = (
        sample(logits, **key, temperature=tau, **filters),
        defined(logits, key, temperature=tau.double(), **filters),
    )
    same = ours.token == right.token
    assert (~same).sum() <= 1
    assert (ours.entropy - right.entropy).abs().max() <= 1e-5
    assert (ours.logp - right.logp)[same].abs().max() <= 1e-5
    near = (ours.behaviour_logp - right.behaviour_logp)[same].abs() <= 1e-5
    assert (~near).sum() <= 1


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_the_same_bits_in_two_runs_and_in_any_batch(backend, filters):
    """Wrong: rows cut by how many there are, sums in the order in which programs end.  The reference's sums
    are PyTorch's own.
    """
    logits, key = torch.randn(33, 50257, device="cuda"), keys(33)
    whole = sample(logits, **key, **filters)
    assert all(torch.equal(a, b) for a, b in zip(whole, sample(logits, **key, **filters), strict=True))
    order = torch.randperm(33, device="cuda")[:5]
    part = sample(logits[order], **{n: x[order] for n, x in key.items()}, **filters)
    for a, b in zip(whole, part, strict=True):
        torch.testing.assert_close(a[order], b, atol=0 if backend == "triton" else 1e-5, rtol=0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_no_launch_waits(backend, filters):
    logits, key = torch.randn(16, 32000, device="cuda"), keys(16)
    sample(logits, **key, **filters)
    with no_waiting():
        sample(logits, **key, **filters)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
def test_in_a_cuda_graph(backend, filters):
    """Wrong: a position, a seed or a temperature that is baked into the graph."""
    if backend == "reference":
        pytest.skip("the definition makes its tensors anew")
    logits, key, tau = torch.randn(16, 32000, device="cuda"), keys(16), torch.ones(16, device="cuda")
    sample(logits, **key, temperature=tau, **filters)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = sample(logits, **key, temperature=tau, **filters)
    for _ in range(3):
        logits.normal_()
        tau.uniform_(0.5, 1.5)
        key["position"] += 1
        graph.replay()
        want = sample(logits, **key, temperature=tau, **filters)
        assert all(torch.equal(a, b) for a, b in zip(out, want, strict=True))


def test_no_compile_per_vocabulary_or_batch(backend):
    """torch.compile takes the op as it is, and once."""
    counter = torch._dynamo.testing.CompileCounter()

    def draw(logits, seed, sequence, position):
        return sample(logits, seed=seed, sequence=sequence, position=position, top_k=3)

    run = torch.compile(draw, fullgraph=True, backend=counter, dynamic=True)
    for B in (4, 7, 12):
        logits, key = torch.randn(B, 1000, device="cuda"), keys(B)
        assert torch.equal(run(logits, *key.values()).token, draw(logits, *key.values()).token)
    assert counter.frame_count == 1


def test_more_than_2_31_logits(backend):
    """Wrong: row offsets in int32.  The pages between the rows are not touched."""
    if torch.cuda.mem_get_info()[0] < 6 * 2**30:
        pytest.skip("needs 6 GiB of free GPU memory")
    far = torch.empty(2**31 + 64, dtype=torch.bfloat16, device="cuda").as_strided((3, 50), (2**30, 1))
    far.copy_(torch.randn(3, 50))
    key = [*keys(3).values(), torch.ones(3, device="cuda")]
    assert all(
        torch.equal(a, b)
        for a, b in zip(forward_op(far, *key, *OFF), forward_op(far.contiguous(), *key, *OFF), strict=True)
    )


def test_70000_rows(backend):
    logits, key = torch.randn(70000, 5, device="cuda"), keys(70000)
    out, last = sample(logits, **key), sample(logits[-5:], **{n: x[-5:] for n, x in key.items()})
    assert torch.equal(out.token[-5:], last.token)


def test_the_tail_reaches_beyond_24_bits(backend):
    """Token 0 is 19 above 151,935 others, and the definition draws another for these sequences: 24-bit
    uniforms end at 16.6.
    """
    logits = torch.zeros(1, 151936, device="cuda")
    logits[0, 0] = 19.0
    rows = torch.tensor([453, 694, 826], device="cuda")
    out = sample(logits.expand(3, -1).contiguous(), seed=5, sequence=rows, position=torch.full_like(rows, 3))
    assert out.token.tolist() == [68395, 44812, 17836]
