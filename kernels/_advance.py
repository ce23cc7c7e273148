"""What a decode step reads and moves on: rows of the batch, records of all sequences, pages."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

RUNNING, STOP, LENGTH = 0, 1, 2  # values of Records.finish


class Rows(NamedTuple):
    """B rows of a batch, each decoding one sequence.

    seq     (B,) int64   its row of the records
    length  (B,) int64   tokens so far, prompt included; the newest has no key and value yet
    drawn   (B,) int64   tokens drawn so far
    budget  (B,) int64   tokens that may be drawn
    until   (B,) int64   longest length
    last    (B,) int64   its newest token
    alive   (B,) bool    whether it goes on
    table   (B, N) int32 its pages, in order; 0 where it has none
    """

    seq: Tensor
    length: Tensor
    drawn: Tensor
    budget: Tensor
    until: Tensor
    last: Tensor
    alive: Tensor
    table: Tensor


class Records(NamedTuple):
    """All tokens of S sequences, in C columns; the last sequence is a pad row, which dead rows write to.

    tokens          (S, C) int64
    logp            (S, C) fp32   of each drawn token, as are the next two
    behaviour_logp  (S, C) fp32
    entropy         (S, C) fp32
    chosen          (S, C) bool   whether the token was drawn
    version         (S, C) int32  of the weights that drew it
    length          (S,) int64    tokens of the sequence
    finish          (S,) int8     why it ended: RUNNING, STOP or LENGTH
    """

    tokens: Tensor
    logp: Tensor
    behaviour_logp: Tensor
    entropy: Tensor
    chosen: Tensor
    version: Tensor
    length: Tensor
    finish: Tensor


class Pages(NamedTuple):
    """The page allocator.

    free  (P,) int32  a stack of pages, of which the lowest `top` are free
    top   (1,) int64
    refs  (P,) int32  users of each page
    """

    free: Tensor
    top: Tensor
    refs: Tensor
