"""Merges compiled by TPU's own compiler, for TPUs that are not there.

Nothing can be run so: what comes out of these programs is tested on CPUs.
"""

import collections
import dataclasses
import math
import sys

import jax
from jax.sharding import AxisType, Mesh, NamedSharding
import jax.numpy as jnp
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax import cli
from mergekit_jax.command.parser import parse
from mergekit_jax.forecasting import compiled, described, topology
from mergekit_jax.sharding import make_mesh
from tests import cases

pytest.importorskip(
  'libtpu', reason="TPU's compiler is for Linux on x86-64: jax[tpu]"
)

DECODER = described.Decoder(
  layers=3, embed=1024, mlp=2560, heads=8, kv_heads=2, vocab=4100
)
SCANNED = dataclasses.replace(DECODER, scanned=True)


@pytest.fixture(scope='module')
def tpus():
  return topology.tpus('v5e:2x4')


def collectives(text):
  return dict(collections.Counter(compiled._COLLECTIVE.findall(text)))


@pytest.mark.parametrize('case', cases.METHODS, ids=repr)
def test_streamed(tpus, case):
  """Also a leaf that the devices do not divide, whose rest is not spread."""
  plan = described.make_plan(
    DECODER.specs, [case.rule], case.experts, mesh=make_mesh(None, tpus)
  )
  kernels = compiled.compile_kernels(plan)
  steps = {kernel.step for kernel in kernels}
  rounds = {f'round {number + 1}' for number in range(case.rounds)}
  assert steps == {*rounds, 'merge', 'measure'}
  for kernel in kernels:
    spread = any(kernel.box.spec)
    # Float64 sums travel as two float32, one number a device and sum.
    assert kernel.collectives.get('all-gather', 0) <= 2 * spread
    elements = math.prod(kernel.box.shape) // (8 if spread else 1)
    assert elements
