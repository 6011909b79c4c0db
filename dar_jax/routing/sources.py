"""Which sources every aggregator sees (chunks, summaries, the final set) and how the history buffer is laid out.

Sublayers are numbered 1..L as in the paper, `v_0` is the embedded input. The stack runs in *steps* of
`sublayers_per_step` sublayers. The buffer holds one row per summary: row 0 is `v_0`, and every step appends
`rows_per_step` rows. Within a step, sublayer outputs are *recent* sources, kept beside the buffer.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import Array


class Summary(NamedTuple):
    """What a finished chunk leaves behind.

    Attributes:
      of: the sublayer outputs of a chunk, `[B, T, D]` each -> the summary `[B, T, D]`.
      is_complete: whether every output of the chunk is in it.
    """

    of: Callable[[tuple[Array, ...]], Array]
    is_complete: bool


def _sum(outputs: tuple[Array, ...]) -> Array:
    wide = jnp.promote_types(outputs[0].dtype, jnp.float32)
    return sum(output.astype(wide) for output in outputs).astype(outputs[0].dtype)


SUMMARIES = {"last": Summary(lambda outputs: outputs[-1], False), "sum": Summary(_sum, True)}


class Final(NamedTuple):
    """What the head's aggregator reads, and with which parameters.

    Attributes:
      sees_outputs: whether it sees {c_0..c_{N-1}} and the outputs of the last chunk, or {c_0..c_N}.
      has_query: whether it has parameters of its own, or those of the last sublayer's aggregator.
    """

    sees_outputs: bool
    has_query: bool


FINALS = {"dedicated": Final(True, True), "shared": Final(True, False), "summaries": Final(False, True)}


@dataclasses.dataclass(frozen=True)
class Layout:
    """The routing structure of a stack of `depth` blocks (paper Eq. 7 and 11).

    Attributes:
      depth: blocks; L = 2 * depth sublayers.
      chunk_size: S sublayers per chunk; 1 (dense: every output is its own summary) or an even divisor of L.
      summary: one of `SUMMARIES`: a chunk is summarised by its last output or by the sum of its outputs.
      final: one of `FINALS`: the sources of the head's aggregator.
      is_additive: whether a reader reads the sum of its sources plus a gate times what routing makes of them, which is
        the residual stream and a correction. Its sources then hold every output.
    """

    depth: int
    chunk_size: int
    summary: str = "last"
    final: str = "dedicated"
    is_additive: bool = False

    def __post_init__(self):
        if self.chunk_size != 1 and (self.chunk_size % 2 or 2 * self.depth % self.chunk_size):
            raise ValueError(f"chunk_size = {self.chunk_size} is neither 1 nor an even divisor of {2 * self.depth}")
        if self.is_additive and not self.keeps_outputs:
            raise ValueError(f"summary = {self.summary} leaves outputs out of the sum")

    @property
    def final_set(self) -> Final:
        return FINALS[self.final]

    @property
    def keeps_outputs(self) -> bool:
        """Whether every output of a finished chunk is still among the sources, alone or in a sum."""
        return self.chunk_size == 1 or SUMMARIES[self.summary].is_complete

    @property
    def sublayers_per_step(self) -> int:
        """P: a chunk; if dense, two blocks (one if depth is odd), which share passes over the buffer."""
        return self.chunk_size if self.chunk_size > 1 else 2 if self.depth % 2 else 4

    @property
    def num_steps(self) -> int:
        return 2 * self.depth // self.sublayers_per_step

    @property
    def rows_per_step(self) -> int:
        return self.sublayers_per_step if self.chunk_size == 1 else 1

    @property
    def num_rows(self) -> int:
        """K: rows of the buffer."""
        return 1 + self.num_steps * self.rows_per_step

    @property
    def num_final_rows(self) -> int:
        """Rows the final aggregator reads from the buffer; the rest of its sources are recent."""
        return self.num_rows - self.rows_per_step if self.final_set.sees_outputs else self.num_rows

    def count(self, step):
        """Filled rows when `step` (0-based, int or traced) starts."""
        return 1 + step * self.rows_per_step

    def sources_of(self, sublayer: int) -> tuple[int, int, int]:
        """Where the sources of a sublayer's aggregator are (0-based): (filled rows, its step, recent outputs of it)."""
        step, position = divmod(sublayer, self.sublayers_per_step)
        return (1 + sublayer, step, 0) if self.chunk_size == 1 else (self.count(step), step, position)

    @property
    def mean_count(self) -> float:
        """Filled rows when a step starts, on average over the steps."""
        return 1 + self.rows_per_step * (self.num_steps - 1) / 2

    def source_counts(self) -> list[int]:
        """Sources of every aggregator: of the L sublayers in order, and of the final one."""
        size = self.chunk_size
        counts = [1 + i // size + i % size for i in range(2 * self.depth)]
        return [*counts, 2 * self.depth // size + size if self.final_set.sees_outputs else self.num_rows]

    def rows(self, outputs: tuple[Array, ...]) -> Array:
        """The rows a step appends, `[rows_per_step, B, T, D]`, from its P sublayer outputs `[B, T, D]`."""
        if self.chunk_size == 1:
            return jnp.stack(outputs)
        return SUMMARIES[self.summary].of(outputs)[None]
