"""Flags that leave a kernel as words."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.driving import drive
from mergekit_jax.driving.reported import pack


@mk.rule
class Reporting:
  """The first expert, with as many flags as it is told."""

  masks: tuple

  def __call__(self, t: mk.Place):
    yield mk.Report(mask=list(self.masks))
    return t.experts[0]


@pytest.mark.parametrize('count', [0, 1, 8, 9, 16, 17, 32, 33, 70])
def test_nothing_is_lost(count):
  """As many flags as fit into a word, one more, and many more."""
  random = np.random.default_rng(0)
  values = random.normal(size=(5, 7)).astype('float32')
  masks = random.random((count, 5, 7)) < 0.5
  rule = Reporting(tuple(jnp.asarray(mask) for mask in masks))
  block = drive.Block(
    base=None,
    experts=[jnp.asarray(values)],
    key=None,
    origin=(0, 0),
    whole=(5, 7),
    stacked=(),
    dtype=jnp.dtype('float32'),
  )
  _, merged, reported = drive.on_layers(rule, block, [], report=True)
  assert np.asarray(merged).tobytes() == values.tobytes()
  flags = jax.jit(pack)(reported)
  found = [np.asarray(flag) for flag in flags.arrays()]
  np.testing.assert_array_equal(np.array(found).reshape(masks.shape), masks)
  assert flags.structure == jax.tree.structure({'mask': [0] * count})
