"""A small training state, and ordinary Orbax writing it in every layout."""

import dataclasses
import logging
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1
import pytest

from mergekit_jax.checkpoint.source import OrbaxLayout

logging.getLogger('absl').setLevel(logging.ERROR)

# No int32 or float32 holds it.
STEP = 2**40 + 1


@pytest.fixture(scope='session')
def mesh():
  return jax.make_mesh(
    (4, 2), ('x', 'y'), axis_types=(jax.sharding.AxisType.Auto,) * 2
  )


@pytest.fixture(scope='session')
def arrays():
  """What every array leaf of `state` should read as."""
  return {
    'params/embed/table': np.arange(48, dtype=np.float32).reshape(8, 6),
    'params/layers/0': np.arange(24).reshape(4, 6).astype(jnp.bfloat16),
    'params/layers/1/scale': np.arange(5, dtype=np.int32),
    'step': np.asarray(STEP),
  }


@pytest.fixture
def state(mesh, arrays):
  """A tree with a key that contains '/', a list, a scalar, None and {}."""
  spec = jax.sharding.PartitionSpec('x', 'y')
  table = jax.device_put(
    arrays['params/embed/table'], jax.sharding.NamedSharding(mesh, spec)
  )
  return {
    'params': {
      'embed/table': table,
      'layers': [
        jnp.asarray(arrays['params/layers/0']),
        {'scale': arrays['params/layers/1/scale']},
      ],
      'nothing': None,
      'empty': {},
    },
    'step': STEP,
  }


@dataclasses.dataclass
class Variant:
  """One way to save a state.

  Attributes:
    save: writes a state to a directory.
    layout: what we should find.
    compressed: whether we should find compressed arrays.
  """

  save: Any
  layout: OrbaxLayout
  compressed: bool = True


def _flat(**options):
  def save(path, state):
    checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler(**options))
    checkpointer.save(path, args=ocp.args.PyTreeSave(state))

  return save


def _standard(path, state):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, state)


def _manager(path, state):
  with ocp.CheckpointManager(path) as manager:
    manager.save(
      3, args=ocp.args.StandardSave(jax.tree.map(jnp.zeros_like, state))
    )
    manager.save(12, args=ocp.args.StandardSave(state))


def _named_item(path, state):
  with ocp.CheckpointManager(path, item_names=('items', 'data')) as manager:
    manager.save(
      0,
      args=ocp.args.Composite(
        items=ocp.args.PyTreeSave(state), data=ocp.args.JsonSave({'epoch': 1})
      ),
    )


def _v1_manager(path, state):
  with v1.training.Checkpointer(path) as checkpointer:
    checkpointer.save(2, state)


VARIANTS = {
  'flat': Variant(_flat(), OrbaxLayout()),
  'uncompressed': Variant(_flat(use_compression=False), OrbaxLayout(), False),
  'zarr3': Variant(_flat(use_zarr3=True), OrbaxLayout(use_zarr3=True)),
  'zarr3_uncompressed': Variant(
    _flat(use_zarr3=True, use_compression=False),
    OrbaxLayout(use_zarr3=True),
    False,
  ),
  'files': Variant(_flat(use_ocdbt=False), OrbaxLayout(use_ocdbt=False)),
  'files_zarr3': Variant(
    _flat(use_ocdbt=False, use_zarr3=True),
    OrbaxLayout(use_ocdbt=False, use_zarr3=True),
  ),
  'standard': Variant(_standard, OrbaxLayout()),
  'manager': Variant(_manager, OrbaxLayout('12/default')),
  'named_item': Variant(_named_item, OrbaxLayout('0/items')),
  'v1': Variant(v1.save, OrbaxLayout('state', use_zarr3=True)),
  'v1_checkpointables': Variant(
    lambda path, state: v1.save_checkpointables(
      path, {'model': state, 'config': {'width': 3}}
    ),
    OrbaxLayout('model', use_zarr3=True),
  ),
  'v1_manager': Variant(_v1_manager, OrbaxLayout('2/state', use_zarr3=True)),
}


@pytest.fixture(params=VARIANTS)
def variant(request):
  return VARIANTS[request.param]


@pytest.fixture
def flat():
  """Saves a state flat, with the handler's options."""
  return lambda path, state, **options: _flat(**options)(path, state)
