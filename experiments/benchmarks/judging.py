"""Merged safetensors models against a float64 reference, element by element.

Two things are mergekit's own. Of entries whose magnitude is that of a trim's
threshold it keeps as many as make up the number, where ours keeps them all; and
its DARE draws masks of its own. Neither is held against it: where it may choose
what is kept, an element is compared with what comes of the choice that it fits
best.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
import contextlib
import dataclasses
import pathlib

import jax.numpy as jnp
from ml_dtypes import bfloat16
import numpy as np
from safetensors import safe_open

from experiments.benchmarks import reference
from experiments.benchmarks.kernels import Masks
import mergekit_jax as mk

SCALE = 0.3
DENSITY = 0.2
DROP_RATE = 0.9
OURS, THEIRS = 'mergekit_jax', 'mergekit'

_SLICE = 2**15  # elements, which stay in a core's cache while they are judged


def compare_with_reference(
  method: str,
  models: Sequence[pathlib.Path],
  outputs: Mapping[str, pathlib.Path],
  shapes: Mapping[str, tuple[int, ...]],
) -> dict[str, dict[str, float]]:
  """Judges what one method made of the same models.

  Args:
    method: its name.
    models: the base and its experts.
    outputs: what `OURS` and `THEIRS` made of them.
    shapes: of the tensors, by name.

  Returns:
    For each output: how many elements there are; how many of them are at an
    edge, right only with the other sign where experts cancel out to the last
    bit of float32, or with what mergekit chose at a threshold; how many are
    outside of one rounding to bfloat16, whatever is chosen; and, as fractions
    of the task vector that the elements should have got, their error and the
    error that rounding alone makes. No element is left out.
  """
  sums: dict[str, Counter] = {tool: Counter() for tool in outputs}
  with contextlib.ExitStack() as stack:
    sources = [stack.enter_context(_tensors(model)) for model in models]
    merged = {
      tool: stack.enter_context(_tensors(output))
      for tool, output in outputs.items()
    }
    for name, shape in shapes.items():
      # In a call of its own, so that no two tensors are in memory at once.
      for tool, found in _judge_tensor(
        _EXPECTATIONS[method],
        Tensor(name, shape, [read(name) for read in sources]),
        {tool: read(name) for tool, read in merged.items()},
      ).items():
        sums[tool].update(found)
  return {
    tool: {
      'elements': total['elements'],
      'at_an_edge': total['edge'],
      'outside': total['outside'],
      'error_of_delta': (total['error'] / total['added']) ** 0.5,
      'rounding_of_delta': (total['rounding'] / total['added']) ** 0.5,
    }
    for tool, total in sums.items()
  }


def _judge_tensor(
  expectation: Callable[[Tensor], Expect],
  of: Tensor,
  outputs: Mapping[str, np.ndarray],
) -> dict[str, Counter]:
  expect = expectation(of)
  sums: dict[str, Counter] = {tool: Counter() for tool in outputs}
  for start in range(0, of.base.size, _SLICE):
    part = slice(start, start + _SLICE)
    for tool, elements in outputs.items():
      output = elements[part].astype(np.float64)
      found = reference.judge(
        output,
        of.base[part].astype(np.float64),
        len(of.experts),
        expect(part, tool, output),
      )
      sums[tool].update(found)
  return sums


@contextlib.contextmanager
def _tensors(
  checkpoint: pathlib.Path,
) -> Iterator[Callable[[str], np.ndarray]]:
  """Reads the tensors of a checkpoint by name, as float32 `[n]`."""
  with contextlib.ExitStack() as stack:
    files = {}
    for path in checkpoint.glob('*.safetensors'):
      file = stack.enter_context(safe_open(path, 'numpy'))
      files |= dict.fromkeys(file.keys(), file)
    yield lambda name: files[name].get_tensor(name).astype(np.float32).ravel()


@dataclasses.dataclass(frozen=True)
class Tensor:
  """A tensor of all models.

  Attributes:
    name: its path.
    shape: its dimensions, of n elements.
    models: float32 `[n]` of the base and each of its experts.
  """

  name: str
  shape: tuple[int, ...]
  models: list[np.ndarray]

  @property
  def base(self) -> np.ndarray:
    return self.models[0]

  @property
  def experts(self) -> list[np.ndarray]:
    return self.models[1:]


# Of a slice: what should come out, for a tool and for what it wrote there.
Expect = Callable[[slice, str, np.ndarray], reference.Expected]


def _part(arrays: Sequence[np.ndarray], part: slice) -> np.ndarray:
  return np.stack([array[part] for array in arrays]).astype(np.float64)


def _average(of: Tensor) -> Expect:
  return lambda part, tool, output: reference.average(_part(of.experts, part))


def _task_arithmetic(of: Tensor) -> Expect:
  deltas = reference.task_vectors(of.base, of.experts)
  return lambda part, tool, output: reference.task_arithmetic(
    of.base[part].astype(np.float64), _part(deltas, part), SCALE
  )


def _ties(of: Tensor) -> Expect:
  deltas = reference.task_vectors(of.base, of.experts)
  cuts = np.stack([[reference.cut(delta, DENSITY)] for delta in deltas])
  stored_cuts = cuts.astype(bfloat16).astype(np.float64)

  def expect(part: slice, tool: str, output: np.ndarray) -> reference.Expected:
    base, vectors = of.base[part].astype(np.float64), _part(deltas, part)
    magnitudes = np.abs(vectors)
    kept = magnitudes >= cuts
    expected = reference.disjoint_mean(base, vectors * kept)
    if tool == OURS:
      return expected
    # Equal to the threshold in bfloat16, in which mergekit computes.
    free = np.abs(magnitudes - stored_cuts) <= reference.rounding(stored_cuts)
    where = np.flatnonzero(free.any(axis=0))
    base, vectors = base[where], vectors[:, where]
    kept = reference.likely_kept(
      output[where], base, vectors, kept[:, where], free[:, where]
    )
    return expected.or_else(
      where, reference.disjoint_mean(base, vectors * kept)
    )

  return expect


def _dare_ties(of: Tensor) -> Expect:
  deltas = reference.task_vectors(of.base, of.experts)
  zeros = {of.name: jnp.zeros(of.shape, jnp.bfloat16)}
  masks = mk.merge(Masks(DROP_RATE), [zeros] * len(deltas), key=0)[of.name]
  bits = np.asarray(masks).astype(np.uint8).ravel()
  # The library draws 16 bits, so its rate is a multiple of 1/65536.
  rates = {OURS: round(DROP_RATE * 2**16) / 2**16, THEIRS: DROP_RATE}

  def expect(part: slice, tool: str, output: np.ndarray) -> reference.Expected:
    base = of.base[part].astype(np.float64)
    vectors = _part(deltas, part) / (1 - rates[tool])
    if tool == OURS:
      kept = np.stack([bits[part] >> i & 1 for i in range(len(vectors))]) > 0
    else:
      free = np.ones(vectors.shape, bool)
      kept = reference.likely_kept(output, base, vectors, ~free, free)
    return reference.disjoint_mean(base, vectors * kept)

  return expect


_EXPECTATIONS = {
  'average': _average,
  'task_arithmetic': _task_arithmetic,
  'ties tensor': _ties,
  'dare_ties': _dare_ties,
}
