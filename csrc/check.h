// Argument errors a user can act on: they become ValueError in Python.
#pragma once

#include <sstream>
#include <stdexcept>

// FASTRL_CHECK(threads >= 1, "threads", "at least 1", threads)  ->  "threads: expected at least 1, got 0"
#define FASTRL_CHECK(condition, argument, expected, got)                         \
  do {                                                                           \
    if (!(condition)) {                                                          \
      std::ostringstream message;                                                \
      message << (argument) << ": expected " << (expected) << ", got " << (got); \
      throw std::invalid_argument(message.str());                                \
    }                                                                            \
  } while (0)
