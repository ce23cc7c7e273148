// Which instruction set a CPU kernel runs with, and how its rows are shared among threads.
#pragma once

#include <cstdint>

namespace fastrl {

enum class Isa { baseline = 0, avx2 = 1, avx512 = 2 };

#if defined(__x86_64__)
#define FASTRL_X86 1
#else
#define FASTRL_X86 0
#endif

Isa isa();  // the best this processor has, or FASTRL_CPU_ISA; throws when that names one it lacks

// Calls body(context, begin, end) over disjoint ranges that cover [0, n), on at most `threads` threads.  Which thread takes
// which range is not fixed, so `body` must not let a row's result depend on the range it came in.
void parallel(int64_t n, int64_t grain, int threads, void (*body)(void*, int64_t, int64_t), void* context);

template <class Body>
void parallel(int64_t n, int64_t grain, int threads, Body& body) {
  parallel(n, grain, threads, [](void* b, int64_t begin, int64_t end) { (*static_cast<Body*>(b))(begin, end); }, &body);
}

}  // namespace fastrl
