"""Triton launches without a GPU: CPU tensors stand for a GPU's, and each launch is handed over, not run.

    with launches(90, receive), use_backend("triton"):
        ops.token_logp(torch.empty(4, 1000), torch.zeros(4, dtype=torch.long))

runs the ops' own Python code up to the launch.  Triton decides there as for an sm_90 what to compile: which
arguments are multiples of 16, which are 1, the options.  `Launch.compile()` compiles exactly that; the
argument values and the grid are what an interpreter of the code needs.  Works with Triton 3.6 to 3.9.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.backends.driver import DriverBase
from triton.runtime.driver import driver
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import JITFunction

from fastrl.errors import UserError
from fastrl.kernels import _backend, _launch
from fastrl.kernels._launch import Gpu

# an A100, an H100 or H200, a B200
GPUS = {
    80: Gpu(capability=(8, 0), multiprocessors=108),
    90: Gpu(capability=(9, 0), multiprocessors=132),
    100: Gpu(capability=(10, 0), multiprocessors=148),
}
SHARED = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # bytes of shared memory a program may have


@dataclass(frozen=True, slots=True, kw_only=True)
class Launch:
    """One launch of a kernel, and what Triton would compile for it."""

    kernel: Any  # the @triton.jit function
    arch: int
    grid: tuple[int, int, int]
    arguments: dict[str, Any]  # every argument by name, in order, constexprs included
    options: dict[str, Any]  # num_warps and the like, as the launcher gave them
    signature: dict[str, str]  # argument -> "*bf16", "i32", "constexpr", ...
    constants: dict[tuple[int, ...], Any]  # by position: constexprs, and arguments that are 1 or None
    attributes: dict[tuple[int, ...], Any]  # by position: which arguments are multiples of 16
    settings: dict[str, Any]  # all options, defaults included
    memo: dict[str, Any] = field(repr=False, compare=False)  # compiled kernels by `key`

    @property
    def name(self) -> str:
        """file.kernel, such as token_logp.forward."""
        return f"{self.kernel.module.rpartition('.')[2]}.{self.kernel.__name__.removesuffix('_kernel')}"

    @property
    def traits(self) -> dict[str, str]:
        """Argument -> its type, with "/16" if it is a multiple of 16; its value if that is compiled in."""
        names = list(self.signature)
        found = {
            n: kind + "/16" * bool(self.attributes.get((i,)))
            for i, (n, kind) in enumerate(self.signature.items())
        }
        for at, value in self.constants.items():
            found[names[at[0]]] = getattr(value, "__name__", str(value))
        return found

    @property
    def text(self) -> str:
        """Its constexprs and the types of its arrays, to be read."""
        arrays = dict.fromkeys(kind.lstrip("*") for kind in self.signature.values() if kind[0] in "*t")
        values = {n: self.traits[n] for n, kind in self.signature.items() if kind == "constexpr"}
        numbers = (f"{n}={v}" for n, v in values.items() if v not in ("True", "False"))
        return " ".join((",".join(arrays), *(n for n, v in values.items() if v == "True"), *numbers))

    @property
    def key(self) -> str:
        """The same for two launches that share a compiled kernel."""
        aligned = {at: True for at, value in self.attributes.items() if value}
        parts = (self.signature, self.constants, aligned, self.options)
        texts = (", ".join(f"{k}: {v}" for k, v in sorted(part.items(), key=str)) for part in parts)
        return f"{self.name} sm_{self.arch} | {' | '.join(texts)}"

    def compile(self) -> Any:
        """Triton's compiled kernel: `.asm` holds its PTX and cubin.

        Raises what a launch would: a compile error, or OutOfResources when it asks for more shared memory
        than a program may have.
        """
        if self.key not in self.memo:
            source = self.kernel.ASTSource(self.kernel, self.signature, self.constants, self.attributes)
            compiled = triton.compile(source, target=target(self.arch), options=self.settings)
            if compiled.metadata.shared > SHARED[self.arch]:
                raise OutOfResources(compiled.metadata.shared, SHARED[self.arch], "shared memory")
            self.memo[self.key] = compiled
        return self.memo[self.key]


@contextlib.contextmanager
def launches(arch: int, receive: Callable[[Launch], object]) -> Iterator[None]:
    """Hand every Triton launch of the `with` block to `receive`, as compiled for sm_`arch`: 80, 90 or 100.

    Within the block the Triton implementations of the ops accept CPU tensors (ask for them by
    `use_backend("triton")`) and behave as on that GPU.  A launch writes nothing unless `receive` does, in
    every thread of the process.  On exit everything is as before.

    Raises:  ValueError for another architecture; UserError under Triton's interpreter.
    """
    if arch not in GPUS:
        raise ValueError(f"arch: expected one of {', '.join(map(str, GPUS))}; got {arch}")
    refuse_interpreter()

    memo: dict[str, Any] = {}
    run = JITFunction.run

    def hand_over(kernel: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        launch = _launch_of(run, kernel, args, kwargs, grid, arch, memo)
        return launch.compile() if warmup else receive(launch)

    with contextlib.ExitStack() as stack:
        stack.enter_context(_substituted(JITFunction, "run", hand_over))
        stack.enter_context(_substituted(JITFunction, "_do_compile", _interrupt))
        stack.enter_context(_active(_Stub(arch)))
        stack.enter_context(_standing_for(GPUS[arch]))
        stack.enter_context(_triton_takes_cpu_tensors())
        yield


@contextlib.contextmanager
def recorded(arch: int) -> Iterator[list[Launch]]:
    """The launches of the `with` block, in order; nothing is compiled."""
    seen: list[Launch] = []
    with launches(arch, seen.append):
        yield seen


def target(arch: int) -> GPUTarget:
    """sm_`arch`, as Triton names it."""
    return GPUTarget("cuda", arch, 32)


def refuse_interpreter() -> None:
    """Raise UserError if kernels run, or were decorated to run, in Triton's interpreter."""
    modules = [m for name, m in list(sys.modules.items()) if name.startswith("fastrl.kernels._triton.")]
    if os.environ.get("TRITON_INTERPRET", "0") != "0" or any(_interpreted(m) for m in modules):
        raise UserError(
            "TRITON_INTERPRET: expected it unset before fastrl is imported, got the interpreter, which "
            "compiles nothing; start a process without it"
        )


# --- between the launcher and Triton ----------------------------------------------------------------
class _Wanted(Exception):
    """Carries what a launch would compile out of Triton's launcher."""

    def __init__(self, signature: Any, constants: Any, options: Any, attributes: Any) -> None:
        super().__init__()
        self.signature, self.constants = signature, constants
        self.options, self.attributes = options, attributes


def _interrupt(
    kernel: Any,
    key: Any,
    signature: Any,
    device: Any,
    constants: Any,
    options: Any,
    attributes: Any,
    warmup: Any,
) -> None:
    """In place of JITFunction._do_compile."""
    raise _Wanted(signature, constants, options, attributes)


def _launch_of(
    run: Callable[..., Any],
    kernel: Any,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    grid: Any,
    arch: int,
    memo: dict[str, Any],
) -> Launch:
    """The launch that kernel[grid](*args, **kwargs) is."""
    own = {n: v for n, v in kwargs.items() if n in kernel.arg_names}
    bound = kernel.signature.bind(*args, **own)
    bound.apply_defaults()
    blocks = tuple(int(g) for g in (grid(bound.arguments) if callable(grid) else grid))
    x, y, z = (*blocks, 1, 1)[:3]

    try:
        run(kernel, *args, grid=grid, warmup=True, **kwargs)
    except _Wanted as wanted:
        return Launch(
            kernel=kernel,
            arch=arch,
            grid=(x, y, z),
            arguments=dict(bound.arguments),
            options={n: v for n, v in kwargs.items() if n not in own},
            signature=wanted.signature,
            constants=wanted.constants,
            attributes=wanted.attributes,
            settings=dict(wanted.options.__dict__),
            memo=memo,
        )
    raise RuntimeError(f"{kernel}: expected Triton to compile it anew for the stub device; it did not")


class _Stub(DriverBase):
    """A Triton driver for a GPU that is not there."""

    def __init__(self, arch: int) -> None:
        self.arch = arch

    @classmethod
    def is_active(cls) -> bool:
        return True

    def map_python_to_cpp_type(self, ty: str) -> str:
        return ty

    def get_current_target(self) -> GPUTarget:
        return target(self.arch)

    def get_current_device(self) -> int:
        return -self.arch  # Triton keeps kernels by device: none is kept under this number

    def get_current_stream(self, device: int = 0) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")

    def get_benchmarker(self) -> Any:
        raise UserError("a launch without a GPU: expected no timing, got a benchmark of it")


# --- substitutions, each undone on exit -------------------------------------------------------------
@contextlib.contextmanager
def _substituted(owner: Any, name: str, value: object) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


@contextlib.contextmanager
def _active(stub: DriverBase) -> Iterator[None]:
    before = driver._active  # `driver.active` would look for a GPU
    driver.set_active(stub)
    try:
        yield
    finally:
        driver._active = before


@contextlib.contextmanager
def _standing_for(gpu: Gpu) -> Iterator[None]:
    _launch.stand_ins.append(gpu)
    try:
        yield
    finally:
        _launch.stand_ins.pop()


@contextlib.contextmanager
def _triton_takes_cpu_tensors() -> Iterator[None]:
    before = {op: table["triton"] for op, table in _backend._table.items() if "triton" in table}
    for op, implementation in before.items():
        _backend._table[op]["triton"] = replace(implementation, devices=("cuda", "cpu"))
    try:
        yield
    finally:
        for op, implementation in before.items():
            _backend._table[op]["triton"] = implementation


def _interpreted(module: ModuleType) -> bool:
    return any(type(x).__name__ == "InterpretedFunction" for x in vars(module).values())
