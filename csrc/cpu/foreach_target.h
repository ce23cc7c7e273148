// Compiles the file FASTRL_ROWS once per instruction set, each time inside a namespace of its own (baseline, avx2, avx512),
// with LANES floats per vector.  A kernel then picks one at run time:
//
//     #define FASTRL_ROWS "token_logp_rows.h"
//     #include "foreach_target.h"
//     const Rows& rows = FASTRL_CHOOSE(kRows);
//
// FASTRL_ROWS may include vec.h and nothing else: an inline function of a standard header that was compiled for AVX-512 could
// be the copy that the linker keeps for everybody.
#include "targets.h"

#if defined(__clang__)
#define FASTRL_TARGET(isa) _Pragma(FASTRL_TEXT(clang attribute push(__attribute__((target(isa))), apply_to = function)))
#define FASTRL_TARGET_END _Pragma("clang attribute pop")
#else
#define FASTRL_TARGET(isa) _Pragma("GCC push_options") _Pragma(FASTRL_TEXT(GCC target(isa)))
#define FASTRL_TARGET_END _Pragma("GCC pop_options")
#pragma GCC diagnostic ignored "-Wpsabi"  // wide vectors never cross a function that is not inlined
#endif
#define FASTRL_TEXT(x) #x

#define LANES 4
namespace fastrl::baseline {
#include FASTRL_ROWS
}
#undef LANES

#if FASTRL_X86
FASTRL_TARGET("avx2,fma")
#define LANES 8
namespace fastrl::avx2 {
#include FASTRL_ROWS
}
#undef LANES
FASTRL_TARGET_END

FASTRL_TARGET("avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")
#define LANES 16
namespace fastrl::avx512 {
#include FASTRL_ROWS
}
#undef LANES
FASTRL_TARGET_END

#define FASTRL_CHOOSE(name) (isa() == Isa::avx512 ? avx512::name : isa() == Isa::avx2 ? avx2::name : baseline::name)
#else
#define FASTRL_CHOOSE(name) (isa(), baseline::name)
#endif
