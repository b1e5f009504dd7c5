"""Boxes are read ahead, into memory that is reused and used in place."""

import concurrent.futures

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.forecasting import described
from mergekit_jax.planning import plan as plans
from mergekit_jax.sharding import make_mesh
from mergekit_jax.streaming import reading

DEVICES = 8


class Numbered:
  """A checkpoint of bfloat16 that says which reads have begun and ended."""

  path = 'made-up'

  def __init__(self, begun, ended):
    self.begun, self.ended = begun, ended

  def read_parts(self, path, parts):
    self.begun.append(path)
    future = concurrent.futures.Future()

    def result():
      for _, buffer in parts:
        buffer[...] = int(path)
      self.ended.append(path)

    future.result = result
    return future


@pytest.fixture
def plan():
  """Six tensors, each a box, of which the first is the largest."""
  sizes = (64, 64, 64, 64, 32, 8)
  specs = {
    str(number): jax.ShapeDtypeStruct((size, 24), jnp.bfloat16)
    for number, size in enumerate(sizes)
  }
  made = described.make_plan(
    specs,
    [mk.task_arithmetic()],
    2,
    mesh=make_mesh({'fsdp': DEVICES}),
    partition_rules={'.*': jax.P('fsdp')},
  )
  assert [unit.tensor.path for unit in made.units()] == sorted(specs)
  return made


@pytest.fixture
def begun():
  return []


@pytest.fixture
def ended():
  return []


@pytest.fixture
def loaded(plan, begun, ended):
  """The units as they are read, of a base and two experts."""
  checkpoint = Numbered(begun, ended)
  paths = {unit.tensor.path: unit.tensor.path for unit in plan.units()}
  models = [reading.Model('a model', checkpoint, paths)] * 3
  return reading.read_ahead(plan, models, done=())


def test_the_next_units_are_read_while_one_is_merged(loaded, begun, ended):
  for number, _ in enumerate(loaded):
    last = min(number + plans.READ_AHEAD, 5)
    assert [int(path) for path in begun[::3]] == [*range(last + 1)]
    assert [int(path) for path in ended[::3]] == [*range(number + 1)]


def test_memory_is_aligned_and_reused(loaded):
  """By turns: of what is merged, and of what is read meanwhile."""
  turns = 1 + plans.READ_AHEAD
  addresses = []
  for number, loading in enumerate(loaded):
    own = [buffer.ctypes.data for each in loading.buffers for buffer in each]
    assert len(own) == 3 * DEVICES
    # Of their own: each model and device may be read and used at once.
    assert len({*own}) == len(own)
    assert all(address % 64 == 0 for address in own)
    addresses.append(own[0])
    if number >= turns:
      assert own[0] == addresses[number - turns]
  assert len({*addresses}) == turns


def test_devices_use_the_buffers_in_place(loaded, plan):
  spread = NamedSharding(plan.mesh, jax.P('fsdp'))
  for number, loading in enumerate(loaded):
    for model, buffers in enumerate(loading.buffers):
      array = loading.array(model, spread, loading.unit.box.shape)
      there = {
        shard.data.unsafe_buffer_pointer() for shard in array.addressable_shards
      }
      assert there == {buffer.ctypes.data for buffer in buffers}
      assert (np.asarray(array).view(jnp.bfloat16) == number).all()
