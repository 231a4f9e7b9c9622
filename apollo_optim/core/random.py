"""The one source of random numbers: a counter-based integer hash. A file format, with golden values.

A projection, a sign or a rounding bit is `h(key, index)`: no generator, no stream, no state. So it is the same on
every device and every shard, in any order, eager or compiled, and a checkpoint need not hold it. `torch.Generator`
promises none of this (its streams differ by device, size and release).

Keys are pairs of 32-bit words made on the host from a parameter's seed and a counter (`key_at`); indices are global
flat positions. Everything on the device is int32 arithmetic modulo 2^32, which every backend has.

A key may be a batch, two words of (b, 1) for b parameters: then what is drawn for n positions is (b, n).
"""

import functools
import hashlib
import math
import zlib
from typing import NamedTuple

import torch
from torch import Tensor

from apollo_optim.core.blocks import Block, part
from apollo_optim.core.compile import in_memory

Key = tuple["int | Tensor", "int | Tensor"]
"""Two int32 words: numbers, 0-D tensors where a compiled step must not specialise, or (b, 1) for a batch."""

# What a key is drawn for: a number, or the CRC of a name that has none. Part of the format: never renumber.
PURPOSES = {"projection": 0, "weight": 1, "exp_avg": 2, "exp_avg_sq": 3}

_64_BITS = (1 << 64) - 1
_SIGN = 1 << 31
_HALF_A_CELL = torch.tensor(2.0**-17, dtype=torch.float32, device="cpu")


def _mix64(z: int) -> int:
    """The finaliser of SplitMix64 (Steele, Lea & Flood, 2014), on Python ints."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _64_BITS
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _64_BITS
    return z ^ (z >> 31)


def mix_seed(*words: int) -> int:
    """One 63-bit seed out of several integers, order mattering: (group seed, position) -> a parameter's seed."""
    return functools.reduce(_mixed_in, words, 0) >> 1


def name_word(name: str) -> int:
    """64 bits of a name, for `mix_seed`."""
    return int.from_bytes(hashlib.blake2b(name.encode(), digest_size=8).digest(), "little")


def _mixed_in(state: int, word: int) -> int:
    return _mix64((state + 0x9E3779B97F4A7C15 + (word & _64_BITS)) & _64_BITS)


@functools.lru_cache(1 << 16)
def _before_counting(seed: int, purpose: str) -> int:
    number = PURPOSES[purpose] if purpose in PURPOSES else zlib.crc32(purpose.encode()) | 1 << 32
    return functools.reduce(_mixed_in, (seed, number), 0)


def key_at(seed: int, purpose: str, counter: int) -> tuple[int, int]:
    """The key of one draw: `counter` is the refresh for a projection and the step for rounding bits."""
    z = _mixed_in(_before_counting(seed, purpose), counter) >> 1  # mix_seed(seed, its number, counter)
    low, high = z & 0xFFFFFFFF, (z >> 31) & 0xFFFFFFFF
    return low - ((low & _SIGN) << 1), high - ((high & _SIGN) << 1)  # as int32


def hash32(index: Tensor, key: Key) -> Tensor:
    """32 random bits for every index.

    `index`: int64 or int32, any shape, >= 0. Returns int32 of the same shape, uniform over all 2^32 words.
    The mixer is "lowbias32" (C. Wellons, 2018, public domain); the second key word goes in between its two
    multiplications, so that two keys never give permutations of one another's stream.
    """
    key0, key1 = key
    x = index.to(torch.int32) ^ key0
    x = (x ^ _shift(x, 16)) * 0x7FEB352D
    if index.dtype == torch.int64:  # beyond 2^32 elements the high word counts too; for all others it is 0
        x = x ^ ((index >> 32).to(torch.int32) * 0x9E3779B)
    x = x ^ key1
    x = (x ^ _shift(x, 15)) * (0x846CA68B - (1 << 32))
    return x ^ _shift(x, 16)


def _shift(x: Tensor, bits: int) -> Tensor:
    """A logical right shift: int32's own keeps the sign."""
    return (x >> bits) & ((1 << (32 - bits)) - 1)


class Dither(NamedTuple):
    """What stochastic rounding adds to every entry (.., m, n) of a matrix, as it is drawn: for each row and column.

    Not a hash for each entry, which would cost more than the step it rounds: u_ij = frac(a_i t_j + b_i). As a_i is odd,
    every u_ij is uniform and any two are independent, so that errors of rounding add up as if all were.

    Attributes:
        t_n: 16 random bits a column, int32.
        a_m1: Odd numbers below 128, (.., m, 1), int32.
        b_m1: 16 random bits a row, int32.
    """

    t_n: Tensor
    a_m1: Tensor
    b_m1: Tensor

    def words(self) -> Tensor:
        """Of every entry 16 random bits, int32, below others."""
        return torch.addcmul(self.b_m1, self.t_n, self.a_m1)

    def uniform(self) -> Tensor:
        """The 16 bits as a number in [0, 1), fp32."""
        if not torch.compiler.is_compiling():
            return (self.words() & 0xFFFF).float() * 2.0**-16
        t_n, a_m1, b_m1 = (t.float() for t in self)  # in floats throughout, and all of it exact
        return (in_memory(t_n * 2.0**-16) * in_memory(a_m1) + in_memory(b_m1 * 2.0**-16)).frac()

    def centred(self) -> Tensor:
        """`uniform`, in the middle of its cells: in (0, 1), fp32, never 0 or 1."""
        if torch.compiler.is_compiling():
            return self.uniform() + 2.0**-17
        return torch.add(_HALF_A_CELL, self.words() & 0xFFFF, alpha=2.0**-16)  # one operation instead of three

    def part(self, at: Block) -> "Dither":
        """Of a block of the matrix."""
        rows = self.a_m1.ndim - 1
        a_m1, b_m1 = (part(t, at[:rows]) for t in (self.a_m1, self.b_m1))
        return Dither(part(self.t_n, at[rows:]), a_m1, b_m1)


def dither(rows: Tensor, columns: Tensor, key: Key) -> Dither:
    """The noise of stochastic rounding. `rows` (.., m) and `columns` (n), int32 or int64: global positions."""
    key0, key1 = key
    column, row = hash32(columns, key), hash32(rows, (key1, key0))
    t_n, b_m1 = _shift(column, 16), _shift(row, 16)
    return Dither(t_n, ((row & 0x3F) * 2 + 1).unsqueeze(-1), b_m1.unsqueeze(-1))


def signs(index: Tensor, key: Key) -> Tensor:
    """+1.0 or -1.0 for every index, fp32: the hash's top bit."""
    return 1.0 - 2.0 * _shift(hash32(index, key), 31).float()


def uniform(index: Tensor, key: Key) -> Tensor:
    """In (0, 1), fp32, never 0 or 1: the hash's top 23 bits, centred in their cells."""
    return (_shift(hash32(index, key), 9).float() + 0.5) * 2.0**-23


def normal_pairs(index: Tensor, key: Key) -> tuple[Tensor, Tensor]:
    """Two independent standard normals for every index (n) (Box & Muller, 1958), fp32."""
    even = 2 * index
    u, v = uniform(torch.cat([even, even + 1]), key).tensor_split(2, dim=-1)  # of numbers 2i and 2i + 1
    radius, angle = (-2.0 * u.log()).sqrt(), (2.0 * math.pi) * v
    return radius * angle.cos(), radius * angle.sin()
