"""The ways in which one rule can be driven; all must give the same model.

A driver is `(rule, experts, base, seed) -> {name: array}` on the flat models of
models.py. The streamed merge is one more entry of `DRIVERS`.
"""

import contextlib
import math
from unittest import mock

import jax
import numpy as np

import mergekit_jax as mk
from mergekit_jax.driving import slices
from mergekit_jax.driving.drive import advance, answer, Block
from mergekit_jax.driving.widths import wide_add
from mergekit_jax.kernels.random import key_for
from tests import models


def in_memory(rule, experts, base, seed=0, **options):
  experts = [models.nest(expert) for expert in experts]
  merged = mk.merge(rule, experts, models.nest(base), key=seed, **options)
  return models.unnest(merged)


@jax.jit
def _jitted(rule, experts, base, key):
  return mk.merge(rule, experts, base, key=key)


def under_jit(rule, experts, base, seed=0):
  experts = [models.nest(expert) for expert in experts]
  merged = _jitted(rule, experts, models.nest(base), jax.random.key(seed))
  return models.unnest(merged)


def boxes(shape):
  """Cuts a matrix of many rows into three uneven boxes."""
  if len(shape) != 2 or shape[0] < 8:
    return [tuple(slice(0, size) for size in shape)]
  rows, columns = shape
  return [
    (slice(0, 5), slice(0, columns)),
    (slice(5, rows), slice(0, 7)),
    (slice(5, rows), slice(7, columns)),
  ]


def blocks_of(name, experts, base, seed, cut, stacked=()):
  """The blocks of one leaf, with the boxes that they are cut from."""
  key = key_for(jax.random.key(seed), name)
  return [
    (
      box,
      Block(
        base=base[name][box],
        experts=[expert[name][box] for expert in experts],
        key=key,
        origin=tuple(ends.start or 0 for ends in box),
        whole=base[name].shape,
        stacked=stacked,
        dtype=base[name].dtype,
      ),
    )
    for box in cut
  ]


def drive(rule, blocks):
  """The loop of drive.py: one round after the other over all blocks."""
  answers = []
  while True:
    steps = [advance(rule, block, answers) for block in blocks]
    if steps[0].merged is not None:
      return [np.asarray(step.merged) for step in steps]
    # The order in which the partials are added must not matter.
    totals = wide_add([step.partials for step in reversed(steps)])
    answers.append(answer(rule, blocks[0], totals, answers))


def in_blocks(rule, experts, base, seed=0):
  scope = getattr(rule, 'scope', 'tensor')
  groups = [list(base)] if scope == 'model' else [[name] for name in base]
  merged = {}
  for group in groups:
    parts = [
      (name, box, block)
      for name in group
      for box, block in blocks_of(
        name, experts, base, seed, boxes(base[name].shape)
      )
    ]
    results = drive(rule, [block for _, _, block in parts])
    for (name, box, _), result in zip(parts, results, strict=True):
      whole = merged.setdefault(
        name, np.full(base[name].shape, np.nan, result.dtype)
      )
      assert result.size == math.prod(s.stop - s.start for s in box)
      whole[box] = result
  return merged


@contextlib.contextmanager
def short_slices(elements):
  """Cuts what a device holds into slices of no more elements than this."""
  for function in (slices.partials, slices.merge):
    function.clear_cache()
  with mock.patch.object(slices, 'ELEMENTS', elements):
    yield
  for function in (slices.partials, slices.merge):
    function.clear_cache()


def sliced(rule, blocks):
  """The loop of stream.py, all blocks being whole leaves on a mesh."""
  answers = []
  placed = [block.experts[0].sharding for block in blocks]
  while not drive_is_done(rule, blocks[0], answers):
    totals = wide_add(
      [
        slices.partials(sharding, rule, block, answers)
        for sharding, block in zip(placed, blocks, strict=True)
      ]
    )
    answers.append(answer(rule, blocks[0], totals, answers))
  return [
    np.asarray(slices.merge(sharding, rule, block, answers, True)[0])
    for sharding, block in zip(placed, blocks, strict=True)
  ]


def drive_is_done(rule, block, answers):
  return jax.eval_shape(advance, rule, block, answers).merged is not None


def in_slices(rule, experts, base, seed=0):
  mesh = models.mesh('2d')
  base, *experts = (models.place(model, mesh) for model in (base, *experts))
  scope = getattr(rule, 'scope', 'tensor')
  groups = [list(base)] if scope == 'model' else [[name] for name in base]
  merged = {}
  with short_slices(10):
    for group in groups:
      blocks = [
        block
        for name in group
        for _, block in blocks_of(
          name, experts, base, seed, [tuple(map(slice, base[name].shape))]
        )
      ]
      for name, result in zip(group, sliced(rule, blocks), strict=True):
        merged[name] = result
  return merged


DRIVERS = {'jit': under_jit, 'blocks': in_blocks, 'slices': in_slices}
