"""Merged boxes are written behind the merge, and none that is read into."""

import concurrent.futures
import zlib

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.forecasting import described
from mergekit_jax.planning import plan as plans
from mergekit_jax.sharding import make_mesh
from mergekit_jax.streaming import reading, sink

UNITS, SHAPE = 4, (16, 24)


@pytest.fixture
def plan():
  specs = {
    str(number): jax.ShapeDtypeStruct(SHAPE, jnp.float32)
    for number in range(UNITS)
  }
  return described.make_plan(
    specs,
    [mk.average()],
    2,
    mesh=make_mesh({'fsdp': 8}),
    partition_rules={'.*': jax.P('fsdp')},
  )


@pytest.fixture
def writing():
  """What is handed to a writer: (path, index, block, future) each."""
  return []


@pytest.fixture
def recorded():
  return {}


@pytest.fixture
def made(writing, recorded):
  def write(path, index, block):
    writing.append((path, index, block, concurrent.futures.Future()))
    return writing[-1][-1]

  return sink.CheckpointSink({}, (), write, recorded.__setitem__)


def finish_all(writing):
  for *_, future in writing:
    if not future.done():
      future.set_result(None)


def loading_of(unit, mesh):
  """A unit whose first model is full of zeros."""
  slot, parts = reading.Slot(), reading.local_parts(unit.box, mesh)
  buffers = slot.buffers([(part.shape, unit.tensor.dtype) for part in parts])
  for buffer in buffers:
    buffer[...] = 0
  return reading.Loading(unit, slot, parts, [buffers], [])


def placed(plan, array):
  bits = np.asarray(array, np.float32).view(np.uint32)
  return jax.device_put(bits, NamedSharding(plan.mesh, jax.P('fsdp')))


def test_as_many_units_are_written_while_one_is_merged(
  plan, made, writing, recorded
):
  merged = placed(plan, np.ones(SHAPE))
  driver = concurrent.futures.ThreadPoolExecutor(1)
  try:
    for number, unit in enumerate(plan.units()):
      loading = loading_of(unit, plan.mesh)
      taking = driver.submit(made.take, loading, merged, {'sums': number})
      if number >= plans.WRITE_BEHIND:
        # It waits for the unit before, and for that alone.
        with pytest.raises(concurrent.futures.TimeoutError):
          taking.result(timeout=0.1)
        finish_all(writing[: -8 * plans.WRITE_BEHIND])
      taking.result(timeout=20)
      assert len(recorded) == max(0, number + 1 - plans.WRITE_BEHIND)
  finally:
    finish_all(writing)
    driver.shutdown()
  made.finish()
  assert [recorded[unit]['sums'] for unit in sorted(recorded)] == [
    *range(UNITS)
  ]


def test_every_part_has_its_checksum(plan, made, writing, recorded):
  values = np.arange(np.prod(SHAPE), dtype=np.float32).reshape(SHAPE)
  unit = next(plan.units())
  made.take(loading_of(unit, plan.mesh), placed(plan, values), {})
  finish_all(writing)
  made.finish()
  ((_, facts),) = recorded.items()
  assert facts['parts'] == [
    [[2 * i, 0], [2, 24], zlib.crc32(values[2 * i : 2 * i + 2].tobytes())]
    for i in range(8)
  ]
  for _, index, block, _ in writing:
    np.testing.assert_array_equal(block, values[index])


def test_an_output_that_is_an_input_is_copied(plan, made, writing):
  """XLA may hand an input on as the output; the next unit is read into it."""
  unit = next(plan.units())
  loading = loading_of(unit, plan.mesh)
  spread = NamedSharding(plan.mesh, jax.P('fsdp'))
  made.take(loading, loading.array(0, spread, SHAPE), {})
  for buffer in loading.buffers[0]:
    buffer[...] = 7
  assert [(block == 0).all() for _, _, block, _ in writing] == [True] * 8
  finish_all(writing)
  made.finish()
