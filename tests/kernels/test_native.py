"""The compiled kernels: csrc/cpu against float64 on every instruction set this processor has, csrc/cuda as
far as nvcc goes.

What each test would catch is said in its docstring.  Without fastrl._C everything that needs it is skipped,
visibly.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from support import ULP, within_budget

from fastrl.kernels._backend import extension, use_backend
from fastrl.kernels.token_logp import (
    backward_into_op,
    backward_op,
    forward_op,
    fused_op,
    reference,
    reference_backward,
    token_logp,
)

ROOT = Path(__file__).parents[2]
C = extension()
ISAS = ("baseline", "avx2", "avx512")
needs_c = pytest.mark.skipif(
    C is None, reason="fastrl._C is not built: pip install -e . (or python setup.py build_ext --inplace)"
)


def case(T, V, dtype=torch.float32, offset=0.0, spread=3.0, tau=None):
    logits = (spread * torch.randn(T, V) + offset).to(dtype)
    tau = torch.rand(T) + 0.5 if tau is None else torch.full((T,), tau)
    return logits, torch.randint(V, (T,)), tau, torch.randn(T), torch.randn(T)


def run(backend, logits, target, tau, dlogp, dentropy):
    """Both directions on one backend: logp, entropy, lse, dlogits."""
    with use_backend(backend, "token_logp"):
        logp, h, m, log_s = forward_op(logits, target, tau, True, False)
        return logp, h, m + log_s, backward_op(dlogp, dentropy, logits, target, tau, h, m, log_s)


def truth(logits, target, tau, dlogp, dentropy):
    z, t = logits.double(), tau.double()
    logp, h, m, log_s = reference(z, target, t, True)
    return (
        logp,
        h,
        m + log_s,
        reference_backward(dlogp.double(), dentropy.double(), z, target, t, h, m, log_s),
    )


# --- values -----------------------------------------------------------------------------------------
@pytest.mark.parametrize("offset", [0.0, 1000.0, -1000.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [7, 1000, 50257])
def test_as_near_to_float64_as_the_reference(isa, V, dtype, offset):
    """Wrong: z_t - logsumexp (misses 1e-5 at 1000), a tail that is dropped (V=7), a gradient rounded towards
    zero (bf16).
    """
    args = case(5, V, dtype, offset)
    ours, theirs, exact = run("cpu", *args), run("reference", *args), truth(*args)
    for mine, its, right in zip(ours, theirs, exact, strict=True):
        within_budget(mine, its, right)
    assert (ours[0].double() - exact[0]).abs().max() <= 1e-5
    assert (ours[1].double() - exact[1]).abs().max() <= 1e-5
    assert ours[3].dtype == dtype


def test_a_vocabulary_of_one(isa):
    """Everything is 0 but lse; the gradient up to what m and log s, both fp32, can say."""
    logp, h, lse, grad = run("cpu", *(args := case(5, 1, offset=1000.0)))
    assert (logp == 0).all()
    assert h.abs().max() <= 1e-30
    assert grad.abs().max() <= 1e-10
    within_budget(lse, run("reference", *args)[2], truth(*args)[2])


@pytest.mark.parametrize("V", [151936, 152064])
def test_large_vocabularies(isa, V):
    """Wrong: one fp32 accumulator over the whole row, which drifts by 1e-4 on near-uniform logits."""
    args = case(2, V, spread=0.01, offset=1000.0, tau=0.7)
    ours, exact = run("cpu", *args), truth(*args)
    for mine, right in zip(ours[:2], exact[:2], strict=True):
        assert (mine.double() - right).abs().max() <= 5e-6
    assert (ours[3].double() - exact[3]).abs().max() <= 1e-6


def test_exp_is_within_one_ulp_and_has_no_bias(isa):
    """Wrong: a polynomial that is only good near 0, an exponent off by one at a seam.  With two logits p = 1
    / (1 + exp(d)).
    """
    d = torch.linspace(0, 80, 20001)
    one, target = torch.ones_like(d), torch.zeros(len(d), dtype=torch.long)
    # -p of the second logit
    grad = run("cpu", torch.stack([0 * d, -d], 1), target, one, one, 0 * one)[3][:, 1].double()
    exact = -torch.sigmoid(-d.double())
    error = (grad - exact) / exact / ULP[torch.float32]
    assert error.abs().max() <= 1.3  # exp, 1 / s and their product round once each
    assert error[d > 18].abs().max() <= 0.8  # there s is 1, and p is exp(-d) itself
    assert abs(error.mean()) <= 0.02


def test_all_logits_below_minus_200(isa):
    """Wrong: exp without subtracting the largest logit."""
    args = case(4, 1000, offset=-250.0, tau=1.0)
    assert args[0].max() < -200
    for mine, right in zip(run("cpu", *args), truth(*args), strict=True):
        assert (mine.double() - right).abs().max() <= 2e-5  # lse itself is about -240: half an ulp is 8e-6


@pytest.mark.parametrize("V", [7, 1000, 9000])
def test_minus_infinity_gives_finite_entropy_and_an_exact_zero_gradient(isa, V):
    """Wrong: 0 * -inf in the entropy; a first block of nothing but -inf that makes NaN of all that
    follows.
    """
    logits, target, tau, dlogp, dentropy = case(3, V)
    logits[:, : V - 2] = -torch.inf
    target[:] = V - 1
    out = run("cpu", logits, target, tau, dlogp, dentropy)
    for mine, right in zip(out, truth(logits, target, tau, dlogp, dentropy), strict=True):
        assert torch.isfinite(mine).all()
        assert (mine.double() - right).abs().max() <= 1e-6
    assert (out[3][:, : V - 2] == 0).all()


@pytest.mark.parametrize("V", [7, 1003])
def test_bf16_gradients_round_to_the_nearest_even(isa, V):
    """Wrong: truncation of fp32 to bf16, which the budget (one ulp) forgives.  NaN must stay NaN, and not
    become infinity.
    """
    logits, *rest = case(8, V, torch.bfloat16)
    rest[2].view(torch.int32)[3] = 0x7FFFFFFF  # a NaN that rounding would carry over into the sign
    narrow, wide = run("cpu", logits, *rest)[3], run("cpu", logits.float(), *rest)[3]
    torch.testing.assert_close(narrow, wide.bfloat16(), rtol=0, atol=0, equal_nan=True)


def test_a_masked_target_has_logp_minus_infinity(isa):
    logits, target, tau, *_ = case(2, 40)
    logits[0, target[0]] = -torch.inf
    logp = run("cpu", logits, target, tau, torch.ones(2), torch.zeros(2))[0]
    assert logp[0] == -torch.inf
    assert torch.isfinite(logp[1])


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_a_bad_logit_is_not_swallowed(isa, poison):
    """Wrong: max and clamp instructions that drop a NaN, so that a diverged model trains on."""
    logits, target, tau, dlogp, dentropy = case(3, 5000)
    logits[1, 4321] = poison
    out = run("cpu", logits, target, tau, dlogp, dentropy)
    for x in out:
        assert torch.isfinite(x[[0, 2]]).all()
        assert not torch.isfinite(x[1]).any()
    logits[1] = -torch.inf  # a row without any finite logit has no distribution
    assert run("cpu", logits, target, tau, dlogp, dentropy)[0][1].isnan()


def test_targets_outside_the_vocabulary(isa):
    """Wrong: an index that is clamped, or read.  logp is NaN; entropy and the rest of the gradient stay."""
    logits, target, tau, dlogp, dentropy = case(5, 33)
    target[:4] = torch.tensor([-100, -1, 33, 2**40])
    ours, exact = (
        run("cpu", logits, target, tau, dlogp, dentropy),
        truth(logits, target, tau, dlogp, dentropy),
    )
    assert ours[0][:4].isnan().all()
    assert torch.isfinite(ours[0][4])
    for mine, right in zip(ours[1:], exact[1:], strict=True):
        assert (mine.double() - right).abs().max() <= 2e-6


# --- layout, threads --------------------------------------------------------------------------------
@needs_c
@pytest.mark.parametrize("view", ["columns", "rows", "transposed", "expanded"])
def test_non_contiguous_logits(view):
    """Wrong: a row stride taken to be V, or a column stride taken to be 1."""
    x = torch.randn(12, 80)
    logits = {"columns": x[:, 3:70], "rows": x[::3], "transposed": x.t(), "expanded": x[:1].expand(6, 80)}[
        view
    ]
    T, V = logits.shape
    rest = torch.randint(V, (T,)), torch.rand(T) + 0.5, torch.randn(T), torch.randn(T)
    for mine, right in zip(run("cpu", logits, *rest), run("cpu", logits.contiguous(), *rest), strict=True):
        assert torch.equal(mine, right)


@needs_c
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_in_place_backward_equals_the_other(dtype):
    """Wrong: a target's logit read after it was overwritten; transposed logits overwritten as if they were
    rows.
    """
    for shape in ((9, 1003), (1003, 9)):
        logits = torch.randn(*shape).to(dtype)
        logits = logits if shape[0] == 9 else logits.t()
        target, tau, dlogp, dentropy = (
            torch.randint(1003, (9,)),
            torch.rand(9) + 0.5,
            torch.randn(9),
            torch.randn(9),
        )
        with use_backend("cpu", "token_logp"):
            _, h, m, log_s = forward_op(logits, target, tau, True, True)
            right = backward_op(dlogp, dentropy, logits, target, tau, h, m, log_s)
            backward_into_op(dlogp, dentropy, logits, target, tau, h, m, log_s)
        assert torch.equal(logits, right)


def test_the_same_bits_for_every_thread_count(isa, threads):
    """Wrong: a reduction whose order depends on how rows are shared out."""
    args = case(70, 3001)
    results = []
    for n in (1, 2, 3):
        threads(n)
        results += [run("cpu", *args), run("cpu", *args)]
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("V", [7, 1003, 50257])
def test_forward_and_gradient_at_once(isa, V, dtype):
    """Wrong: the target's logit read after its gradient was written over it.  A batch whose rows are not
    evenly spaced.
    """
    batch = torch.empty(2, 4, V).to(dtype)
    logits = batch[:, :-1]
    flat, target, tau, dlogp, dentropy = case(6, V, dtype, offset=100.0)
    target[1], target[2] = -1, V
    dlogp[3] = dentropy[3] = 0
    ours, exact = [], truth(flat, target, tau, dlogp, dentropy)
    for fused in (True, False):
        logits.copy_(flat.view(2, 3, V))
        with use_backend("cpu", "token_logp"):
            if fused:
                stats = fused_op(logits, target, tau, dlogp, dentropy)
            else:
                stats = forward_op(logits, target, tau, True, False)
                backward_into_op(dlogp, dentropy, logits, target, tau, *stats[1:])
        ours.append((stats[0].nan_to_num(), stats[1], stats[2] + stats[3], logits.reshape(6, V).clone()))
    for a, b, right in zip(*ours, exact, strict=True):
        # `truth` in double inside, or rounded m
        torch.testing.assert_close(a, b, atol=1e-6, rtol=ULP[dtype] if a.ndim > 1 else 1e-6)
        within_budget(a, b, right.nan_to_num())


@needs_c
def test_offsets_beyond_2_to_the_31():
    """Wrong: a 32-bit row offset, or a 16-bit row number.  The pages between the rows are never touched."""
    logits = torch.empty(2**31 + 64, dtype=torch.bfloat16).as_strided((3, 7), (2**30, 1))
    logits.copy_(torch.randn(3, 7))
    rest = torch.tensor([0, 3, 6]), torch.ones(3), torch.randn(3), torch.randn(3)
    right = run("cpu", logits.contiguous(), *rest)
    assert all(torch.equal(a, b) for a, b in zip(run("cpu", logits, *rest), right, strict=True))
    many = case(70000, 3)
    last = run("cpu", *(x[-5:] for x in many))
    assert all(torch.equal(a[-5:], b) for a, b in zip(run("cpu", *many), last, strict=True))


@needs_c
def test_no_rows():
    out = token_logp(torch.empty(0, 5, requires_grad=True), torch.empty(0, dtype=torch.long), entropy=True)
    assert out.logp.shape == out.entropy.shape == (0,)


@needs_c
def test_rows_without_gradient_are_zero_and_not_read():
    """Masked rows may hold anything, NaN included, and must not disturb the others."""
    logits, target, tau, dlogp, dentropy = case(4, 100)
    dlogp[2] = dentropy[2] = 0
    logits[2] = torch.nan
    grad = run("cpu", logits, target, tau, dlogp, dentropy)[3]
    assert (grad[2] == 0).all()
    assert torch.isfinite(grad).all()


@needs_c
def test_chosen_by_default_on_cpu():
    """Wrong: a kernel that is built and never runs."""
    logits, target, tau, *_ = case(3, 50)
    assert torch.equal(
        token_logp(logits, target, temperature=tau).logp, run("cpu", logits, target, tau, tau, tau)[0]
    )


# --- messages ---------------------------------------------------------------------------------------
@needs_c
@pytest.mark.parametrize(
    "changes, message",
    [
        ({"T": -1}, "T: expected at least 0, got -1"),
        ({"V": 0}, "V: expected at least 1, got 0"),
        ({"code": 2}, r"code: expected 0 \(fp32\) or 1 \(bf16\), got 2"),
        ({"L": 0}, "L: expected at least 1, got 0"),
        ({"row": -4}, "row, batch: expected strides of at least 0, got -4"),
        ({"threads": 0}, "threads: expected at least 1, got 0"),
        ({"logits": 0}, "logits, target, temperature: expected addresses, got 0"),
        ({"logp": 0}, "logp, m, log_s: expected addresses, got 0"),
    ],
)
def test_bad_arguments_are_value_errors(changes, message):
    given = {
        "logits": 8,
        "code": 0,
        "L": 1,
        "batch": 0,
        "row": 4,
        "target": 8,
        "temperature": 8,
        "logp": 8,
        "entropy": 0,
        "m": 8,
        "log_s": 8,
    }
    with pytest.raises(ValueError, match=message):
        C.token_logp_forward_cpu(*(given | {"T": 1, "V": 4, "threads": 1} | changes).values())


@needs_c
def test_an_unknown_or_absent_instruction_set_is_an_error(monkeypatch):
    monkeypatch.setenv("FASTRL_CPU_ISA", "avx1024")
    with pytest.raises(
        ValueError, match=r"FASTRL_CPU_ISA: expected baseline.* on this processor, got avx1024"
    ):
        C.cpu_isa()


# --- the module -------------------------------------------------------------------------------------
def python(code: str) -> str:
    env = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "2"}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd="/")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


MAPPED = (
    "[l.split()[-1] for l in open('/proc/self/maps') if any(n in l for n in ('libgomp', 'libomp', "
    "'libiomp'))]"
)


@needs_c
@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc/self/maps")
@pytest.mark.parametrize(
    "order", ["import torch; from fastrl import _C", "from fastrl import _C; import torch"]
)
def test_one_openmp_runtime_is_mapped(order):
    """Wrong: -fopenmp at link time, which brings a second libgomp beside the one inside torch's wheel."""
    use = (
        "from fastrl.kernels.token_logp import token_logp; token_logp(torch.randn(64, 4096), "
        "torch.zeros(64).long())"
    )
    found = python(f"{order}; {use}; print(len(set({MAPPED})), _C.threads_from())").split(maxsplit=1)
    assert found[0] == "1"
    assert "omp" in found[1]


@needs_c
def test_the_module_works_without_torch():
    code = "from fastrl import _C; import sys; print(_C.cpu_isa() in _C.cpu_isas(), 'torch' in sys.modules)"
    assert python(code) == "True False"


@needs_c
@pytest.mark.skipif(not hasattr(C, "token_logp_forward_cuda"), reason="fastrl._C was built without CUDA")
@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_cuda_without_a_driver_is_a_readable_error():
    with pytest.raises(RuntimeError, match=r"^CUDA, .*: .*(driver|device)"):
        C.token_logp_forward_cuda(8, 0, 1, 0, 4, 8, 8, 8, 0, 8, 8, 1, 4, 0)


NVCC = shutil.which("nvcc", path=f"{os.environ.get('CUDA_HOME', '')}/bin") or shutil.which("nvcc")


@pytest.mark.skipif(NVCC is None, reason="no nvcc on this machine")
@pytest.mark.parametrize("source", sorted((ROOT / "csrc" / "cuda").glob("*.cu")), ids=lambda p: p.name)
def test_cuda_sources_compile_without_spills(source, tmp_path):
    """Wrong: arrays indexed by what is not known at compile time,
    which live in memory instead of registers.
    """
    command = [
        NVCC,
        "-O3",
        "-std=c++17",
        "-gencode=arch=compute_80,code=sm_80",
        "-gencode=arch=compute_90,code=sm_90",
        "-Xptxas",
        "-v",
        "-DFASTRL_CUDA=1",
        '-DFASTRL_CUDA_ARCH="80,90"',
        "-c",
        str(source),
    ]
    done = subprocess.run([*command, "-o", str(tmp_path / "x.o")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stderr.splitlines() if "spill" in line]
    assert lines or source.name == "build.cu"  # which has no kernel
    assert all("0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in line for line in lines), (
        done.stderr
    )


@pytest.mark.gpu
@pytest.mark.skipif(not hasattr(C, "token_logp_forward_cuda"), reason="fastrl._C was built without CUDA")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("T, V", [(5, 7), (70000, 3), (3, 1000), (64, 50257), (16, 151936)])
def test_cuda_kernel_within_budget(T, V, dtype):
    """On its first GPU run: value, gradient, in place, the same bits twice."""
    args = tuple(x.cuda() for x in case(T, V, dtype, offset=100.0))
    ours, again, theirs, exact = run("cuda", *args), run("cuda", *args), run("reference", *args), truth(*args)
    for mine, twice, its, right in zip(ours, again, theirs, exact, strict=True):
        within_budget(mine, its, right)
        assert torch.equal(mine, twice)
    logits, target, tau, dlogp, dentropy = args
    with use_backend("cuda", "token_logp"):
        _, h, m, log_s = forward_op(logits, target, tau, True, True)
        backward_into_op(dlogp, dentropy, logits, target, tau, h, m, log_s)
    assert torch.equal(logits, ours[3])
