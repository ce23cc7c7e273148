"""What the Triton kernels are compiled for: the launches of the calls in `bench/calls*.py`, each once.

Two launches are one variant if Triton would compile one kernel for them: the same constexprs, dtypes,
specialised arguments and options.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from fastrl.bench import calls, calls_of_models
from fastrl.bench.calls import Block, Blocks
from fastrl.bench.offline import Launch, launches
from fastrl.kernels._backend import use_backend

OPS: dict[str, Callable[[], Blocks]] = {
    "advance": calls_of_models.advance,
    "decode_attention": calls_of_models.decode_attention,
    "decoder_layer": calls_of_models.decoder_layer,
    "gae": calls_of_models.gae,
    "group_advantage": calls_of_models.group_advantage,
    "linear": calls.linear,
    "linear_cross_entropy": calls.linear_cross_entropy,
    "linear_logp": calls.linear_logp,
    "linear_loss": calls.linear_loss,
    "perturb_init": calls_of_models.perturb_init,
    "perturb_step": calls_of_models.perturb_step,
    "policy_loss": calls_of_models.policy_loss,
    "rms_norm": calls_of_models.rms_norm,
    "rope": calls_of_models.rope,
    "sample": calls.sample,
    "swiglu": calls_of_models.swiglu,
    "token_logp": calls.token_logp,
}


LARGEST_CODE = 3  # of norms and shapes; larger constexprs are sizes
LOADS, STORES, BOTH = ("load",), ("store",), ("load", "store")
MOVES: dict[str, tuple[str, ...]] = {  # kernel -> what moves 16 bytes at a time where sizes allow it
    "decode_attention.combine": LOADS,
    "decode_attention.split": BOTH,
    "group_advantage.parts": LOADS,
    "group_advantage.tile": BOTH,
    "linear.forward": BOTH,
    "linear_cross_entropy.backward": BOTH,
    "linear_cross_entropy.forward": LOADS,
    "linear_logp.partial": LOADS,
    "linear_logp.target": LOADS,
    "linear_logp_hopper.partial": LOADS,
    "linear_logp_wide.tile": LOADS,
    "linear_residual.enter": LOADS,
    "linear_residual.residual": LOADS,
    "norm_linear.gated": LOADS,
    "norm_linear.heads": LOADS,
    "perturb_init.start": STORES,
    "perturb_l1.excess": LOADS,
    "perturb_l1.largest": LOADS,
    "perturb_l1.move": BOTH,
    "perturb_l1.probe": LOADS,
    "perturb_l1.shrink": BOTH,
    "perturb_step.step": BOTH,
    "perturb_step.sums": LOADS,
    "perturb_token.token": BOTH,
    "policy_loss.mean": BOTH,
    "policy_loss.token": BOTH,
    "rms_norm.backward": BOTH,
    "rms_norm.forward": BOTH,
    "rms_norm.walk_backward": BOTH,
    "rms_norm.walk_forward": BOTH,
    "rms_norm.walk_weight": LOADS,
    "rope.backward": BOTH,
    "rope.turn": BOTH,
    "sample.draw": LOADS,
    "sample_window.survey": LOADS,
    "swiglu.backward": BOTH,
    "swiglu.forward": BOTH,
    "token_logp.backward": BOTH,
    "token_logp.forward": LOADS,
    "token_logp.fused": BOTH,
}
# begin anywhere, or are a few numbers: packed sequences, sorted samples, records, sums of programs, lists of
# tokens; sample_filtered.draw has only 4 numbers of 16 bits a thread, so that two programs fit
NARROW = (
    "_partials.combine",
    "advance.forward",
    "gae.gae",
    "group_advantage.walk",
    "linear_logp.combine",
    "newest.newest",
    "perturb_l1.combine_probes",
    "policy_loss.combine",
    "sample.combine",
    "sample_filtered.draw",
    "sample_floor.settle",
)


@dataclass(slots=True)
class Variant:
    """A launch, and whether one of the calls that lead to it allows 16-byte accesses."""

    launch: Launch
    wide: bool

    @property
    def moves(self) -> tuple[str, ...]:
        """What must move 16 bytes at a time."""
        return MOVES.get(self.launch.name, ()) if self.wide else ()


def blocks(names: Sequence[str] = ()) -> Iterator[Block]:
    """The blocks of the named ops; of all without names."""
    for name, of_op in OPS.items():
        if not names or name in names:
            yield from of_op()


def record(arch: int, names: Sequence[str] = ()) -> list[Variant]:
    """The variants of the named ops on sm_`arch`, in the order of their first launch."""
    found: dict[str, Variant] = {}
    wide = False

    def receive(launch: Launch) -> None:
        variant = found.setdefault(launch.key, Variant(launch, wide))
        variant.wide |= wide

    with launches(arch, receive), use_backend("triton"):
        for block in blocks(names):
            wide = block.wide
            for given in block.calls():
                block.run(given)
    return list(found.values())


def cover(variants: Sequence[Variant]) -> list[Variant]:
    """A part of them in which each kernel shows every value of its flags: constexprs that are not sizes."""
    left = {id(v): _flags(v.launch) for v in variants}
    chosen = []
    for _, of_kernel in itertools.groupby(sorted(variants, key=_kernel), _kernel):
        some = list(of_kernel)
        best: Variant | None = some[0]  # a kernel without flags counts, too
        while best is not None:
            chosen.append(best)
            shown = left[id(best)].copy()
            for variant in some:
                left[id(variant)] -= shown
            best = max((v for v in some if left[id(v)]), key=lambda v: len(left[id(v)]), default=None)
    return chosen


def _kernel(variant: Variant) -> tuple[str, int]:
    return variant.launch.name, variant.launch.arch


def _flags(launch: Launch) -> set[tuple[str, str]]:
    """(constexpr, value), except of sizes: a flag is a bool, a function, None or a small code."""
    names = list(launch.signature)
    values = {names[at[0]]: value for at, value in launch.constants.items()}
    return {
        (n, launch.traits[n])
        for n, value in values.items()
        if launch.signature[n] == "constexpr" and not (isinstance(value, int) and value > LARGEST_CODE)
    }
