// Argument errors a user can act on: they become ValueError in Python.
#pragma once

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <string>

// FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads)  ->  "threads: expected at least 1, got 0"
#define FASTRL_CHECK(condition, argument, expected, got)                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::ostringstream message;                                                \
      message << (argument) << ": expected " << (expected) << ", got " << (got); \
      throw std::invalid_argument(message.str());                                \
    }                                                                            \
  } while (0)

namespace fastrl {

// Ends (S+1,) of S sequences among T tokens, through which arrays of T are read: none leads outside.
inline void check_ends(const char* name, const int64_t* ends, int64_t S, int64_t T) {
  for (int64_t s = 0; s < S; s++) {
    const bool fine = ends[s] >= 0 && ends[s] <= ends[s + 1] && ends[s + 1] <= T;
    FASTRL_CHECK(fine, name, "non-decreasing ends, 0 to " + std::to_string(T), std::to_string(ends[s]) + " before " + std::to_string(ends[s + 1]));
  }
}

}  // namespace fastrl
