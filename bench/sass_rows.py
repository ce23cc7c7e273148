"""The kernels whose machine code is counted: a production call of each, its main loop, and the goal.

An element is what the unit says: a logit, a token, a value of a row.  Sizes are those of Qwen2.5-0.5B
(D = 896, 14 and 2 heads of 64, V = 151936) unless the label names others.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from fastrl.bench import sass_calls as call
from fastrl.bench.disassembly import Function, Loop, Path
from fastrl.bench.sass_calls import T, V


@dataclass(frozen=True, slots=True, kw_only=True)
class Main:
    """Which part of a kernel is its main loop: of the loops that hold `has` and not `lacks`, the longest.

    Without `has` it is the kernel from begin to end, of which every program runs one.
    """

    has: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    outer: bool = False  # it may hold other loops
    first: bool = False  # the first of them instead: the others are for rare inputs

    def find(self, code: Function) -> Loop | None:
        """The loop; None for the whole kernel.  Raises ValueError where there is none."""
        if not self.has:
            return None
        fitting = [loop for loop in code.loops if self._fits(loop)]
        if not fitting:
            raise ValueError(f"{code.name}: expected a loop with {self.has}, without {self.lacks}; got none")
        return fitting[0] if self.first else max(fitting, key=lambda loop: len(loop.body))

    def _fits(self, loop: Loop) -> bool:
        return all(loop.has(n) for n in self.has) and not loop.has(*self.lacks) and loop.nested <= self.outer


@dataclass(frozen=True, slots=True, kw_only=True)
class Elements:
    """How many elements a thread handles in one pass: `fixed`, or the bytes it moves by `names` / `size`."""

    size: float = 1
    names: tuple[str, ...] = ("LDG",)
    fixed: float = 0

    def of(self, path: Path) -> float:
        return self.fixed or path.moved(*self.names) / self.size


@dataclass(frozen=True, slots=True)
class Problem:
    """The work of one call as it is benchmarked."""

    name: str
    elements: float
    bytes: float  # read and written


@dataclass(frozen=True, slots=True)
class Goal:
    figure: str  # a field of sass.Figures
    most: float = math.inf
    least: float = -math.inf
    was: float | None = None  # before the kernel was rewritten for it

    @property
    def text(self) -> str:
        bound = f"<= {self.most:g}" if self.most < math.inf else f">= {self.least:g}"
        return bound if self.was is None else f"{bound}, was {self.was:g}"

    def by(self, value: float) -> float:
        """How far `value` is from the goal, as a share of it; 0 where it is met."""
        if value > self.most:
            return value / self.most - 1 if self.most else value
        return max(0.0, 1 - value / self.least) if self.least > 0 else 0.0


@dataclass(frozen=True, slots=True)
class Row:
    label: str
    kernel: str  # file.kernel, or a part of the mangled name of a kernel of csrc/cuda
    call: Callable[[], object] | None  # None for csrc/cuda
    main: Main
    elements: Elements
    _: KW_ONLY
    unit: str = "logit"
    body: bool = False  # count everything in the loop, rare turns and nested loops once, not the path
    goals: tuple[Goal, ...] = ()
    problem: Problem | None = None
    passes: int = 1  # over the elements
    native: tuple[int, int] = (0, 0)  # threads, and bytes of dynamic shared memory, of csrc/cuda


# --- rows -------------------------------------------------------------------------------------------
LOGITS = float(T * V)
READ = Problem(f"{T} rows of {V} read", LOGITS, 2 * LOGITS)
IN_PLACE = Problem(f"{T} rows of {V} read and written", LOGITS, 4 * LOGITS)
TILED = Problem(f"T={T} V={V} D=896", LOGITS / 128, 2 * V * 896)
DRAWN = Problem(f"256 rows of {V}, fp32", 256.0 * V, 4 * 256.0 * V)
SUMMED = Problem("8 x 4096 x 4096, fp32 and bf16 read", 2.0**27, 6 * 2.0**27)
STEPPED = Problem("8 x 4096 x 4096, fp32 and bf16 read, fp32 written", 2.0**27, 10 * 2.0**27)
NORMED = Problem("T=16384 D=4096, two read and two written", 2.0**26, 8 * 2.0**26)
NORMED_BACK = Problem("T=16384 D=4096, three read and one written", 2.0**26, 8 * 2.0**26)
CLIPPED = Problem("131072 tokens, 5 columns", 131072, 21 * 131072)
ALL_COLUMNS = Problem("131072 tokens, 10 columns", 131072, 37 * 131072)

BF16, FP32, FROM_CHIP = Elements(size=2), Elements(size=4), Elements(size=2, names=("LDS",))
WHOLE, READING, STORING = Main(), Main(has=("LDG",), lacks=("STG",)), Main(has=("LDG", "STG"))
SUMMING, WRITING = Main(has=("LDS", "MUFU"), lacks=("STG", "SHFL")), Main(has=("LDS", "STG.E.128"))
IN_PACKS = Main(has=("LDG", "STG.E.128"))  # not the loop for rows that start anywhere
# of the warps that compute; the loop around it, with BRX, hands specialised warps their part
EPILOGUE, PRODUCT = Main(has=("MUFU",), lacks=("BRX",), outer=True), Main(has=("HMMA",))
ONE, FOUR, EIGHT = Elements(fixed=1), Elements(fixed=4), Elements(fixed=8)
# the two reads of a row under filters take 0.23 ms of 0.25, settling it the rest; the search before took 1.42
NO_FP64 = Goal("fp64", most=0, was=16)
SURVEY = (NO_FP64, Goal("predicted_ms", most=0.07, was=1.42))
DRAW = (NO_FP64, Goal("predicted_ms", most=0.16, was=1.42))
SUMMING_ROWS = Main(has=("LDG", "MUFU"), lacks=("STG",))
RACING = Main(has=("LDG", "MUFU", "STG"))
FIRST = Main(has=("LDG",), lacks=("STG",), first=True)
FEWER, FEWER_STORED = (Goal("instructions", most=9.5, was=n) for n in (15.75, 23.38))
SHARE = (512, 76 << 10)  # a row of 151936 in bf16 lies on 4 CTAs

ROWS = (
    Row(
        "token_logp forward bf16 + entropy",
        "token_logp.forward",
        call.logp,
        READING,
        BF16,
        goals=(FEWER,),
        problem=READ,
    ),
    Row("token_logp forward bf16", "token_logp.forward", call.logp_alone, READING, BF16, problem=READ),
    Row("token_logp forward fp32 + entropy", "token_logp.forward", call.logp_fp32, READING, FP32),
    Row(
        "token_logp backward bf16", "token_logp.backward", call.logp_backward, STORING, BF16, problem=IN_PLACE
    ),
    Row("token_logp fused, sums", "token_logp.fused", call.logp_fused, READING, BF16, problem=READ),
    Row("token_logp fused, stores", "token_logp.fused", call.logp_fused, STORING, BF16, problem=IN_PLACE),
    Row("csrc forward bf16", "forwardI13__nv_bfloat16E", None, READING, BF16, problem=READ, native=(512, 0)),
    Row(
        "csrc backward bf16",
        "backwardI13__nv_bfloat16S2_",
        None,
        IN_PACKS,
        BF16,
        problem=IN_PLACE,
        native=(512, 0),
    ),
    Row("csrc fused bf16, sums", "fusedI13__nv_bfloat16S2_", None, SUMMING, FROM_CHIP, native=SHARE),
    Row(
        "csrc fused bf16, stores",
        "fusedI13__nv_bfloat16S2_",
        None,
        WRITING,
        FROM_CHIP,
        goals=(FEWER_STORED,),
        native=SHARE,
    ),
    Row(
        "linear_logp epilogue D=896",
        "linear_logp_hopper.partial",
        call.head,
        EPILOGUE,
        ONE,
        unit="tile",
        body=True,
        goals=(Goal("instructions", most=1500, was=2242),),
        problem=TILED,
    ),
    Row(
        "linear_logp tile D=2048",
        "linear_logp_wide.tile",
        call.head_of_wide_model,
        WHOLE,
        Elements(fixed=16),
        body=True,
    ),
    Row("linear_cross_entropy forward", "linear_cross_entropy.forward", call.cross_entropy, READING, FP32),
    Row("linear_cross_entropy backward", "linear_cross_entropy.backward", call.cross_entropy, STORING, FP32),
    Row("sample, draw", "sample.draw", call.draw, READING, FP32, problem=DRAWN),
    Row(
        "sample top_p, survey",
        "sample_window.survey",
        call.draw_top_p,
        SUMMING_ROWS,
        FP32,
        goals=SURVEY,
        problem=DRAWN,
    ),
    Row(
        "sample top_p, draw",
        "sample_filtered.draw",
        call.draw_top_p,
        RACING,
        FP32,
        goals=DRAW,
        problem=DRAWN,
    ),
    Row("rms_norm forward D=896", "rms_norm.forward", call.norm, WHOLE, EIGHT, unit="value"),
    Row(
        "rms_norm forward D=4096",
        "rms_norm.forward",
        call.norm_4096,
        WHOLE,
        Elements(fixed=16),
        unit="value",
        problem=NORMED,
    ),
    Row("rms_norm backward D=896", "rms_norm.backward", call.norm, STORING, Elements(fixed=16), unit="value"),
    Row(
        "rms_norm backward D=4096",
        "rms_norm.backward",
        call.norm_4096,
        STORING,
        Elements(fixed=16),
        unit="value",
        problem=NORMED_BACK,
    ),
    Row("swiglu forward", "swiglu.forward", call.gated, WHOLE, EIGHT, unit="value"),
    Row("swiglu backward", "swiglu.backward", call.gated, WHOLE, EIGHT, unit="value"),
    Row("rope", "rope.turn", call.rotate, WHOLE, Elements(size=4, names=("STG",)), unit="pair"),
    Row("decode split bf16 E=64", "decode_attention.split", call.decode, PRODUCT, ONE, unit="16 KB"),
    Row(
        "perturb_step sequence, sums",
        "perturb_step.sums",
        call.attack,
        FIRST,
        Elements(size=6),
        unit="value",
        problem=SUMMED,
    ),
    Row(
        "perturb_step sequence, step",
        "perturb_step.step",
        call.attack,
        STORING,
        Elements(size=6),
        unit="value",
        problem=STEPPED,
    ),
    Row(
        "policy_loss clip, mask", "policy_loss.token", call.clip, STORING, FOUR, unit="token", problem=CLIPPED
    ),
    Row(
        "policy_loss clip, all columns",
        "policy_loss.token",
        call.clip_all,
        STORING,
        FOUR,
        unit="token",
        problem=ALL_COLUMNS,
    ),
    Row("gae", "gae.gae", call.advantages, STORING, Elements(size=8), unit="token"),
)
