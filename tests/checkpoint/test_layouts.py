"""Checkpoints as the frameworks write them, merged and restored their way."""

from collections.abc import Callable
import dataclasses
import re
from typing import Any

from flax import nnx
from flax.training import train_state
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1
import pytest
import tensorstore as ts

import mergekit_jax as mk
from mergekit_jax.jobs import caveats, job
from tests import checkpoints, compare

SCALE = 0.5
EMBED, LAYERS, MLP = 4, 3, 6


def params(layout, number):
  """Model `number` of a layout, 0 being the base; whole numbers throughout."""

  def leaf(shape):
    random = np.random.default_rng([number, *shape])
    return random.integers(-9, 9, shape).astype(np.float32)

  is_shape = lambda node: isinstance(node, tuple)
  return jax.tree.map(leaf, layout.shapes, is_leaf=is_shape)


def merged(layout):
  """What the merge should give: exact, as halves of whole numbers are."""
  base, one, two = (params(layout, number) for number in range(3))
  return jax.tree.map(
    lambda b, x, y: b + np.float32(SCALE) * ((x - b) + (y - b)), base, one, two
  )


@dataclasses.dataclass
class Layout:
  """How a framework lays a model down.

  Attributes:
    shapes: the shapes of the parameters, as it nests them.
    save: writes the training state around some parameters to a directory.
    restore: gives the parameters in a directory, knowing their shapes only.
    root: what comes before the paths of `shapes` in the checkpoint.
    stacked_axes: where layers are stacked; None if the metadata says it.
    kept: the paths of the output beside those of `shapes`.
  """

  shapes: Any
  save: Callable[[Any, Any], None]
  restore: Callable[[Any, Any], Any]
  root: str = 'params'
  stacked_axes: Any = None
  kept: tuple[str, ...] = ()


def abstract(tree):
  return jax.tree.map(
    lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), tree
  )


def standard_save(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(path, tree)


def standard_restore(path, tree):
  with ocp.StandardCheckpointer() as checkpointer:
    return checkpointer.restore(path, abstract(tree))


# MaxText: item `items` of a CheckpointManager; load_parameters_path names it.


def maxtext_save(path, tree, scanned=True, **beside):
  with ocp.CheckpointManager(path, item_names=('items',)) as manager:
    state = {
      'params': {'params': tree},
      'opt_state': {'mu': {'params': tree}, 'count': np.int32(7)},
      'step': np.int32(7),
      **beside,
    }
    manager.save(
      0,
      args=ocp.args.Composite(items=ocp.args.PyTreeSave(state)),
      custom_metadata={'scan_layers': scanned},
    )


def maxtext_restore(path, tree):
  target = {'params': {'params': abstract(tree)}}
  restored = ocp.Checkpointer(ocp.PyTreeCheckpointHandler()).restore(
    path / '0' / 'items',
    item=target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
    transforms={},
  )
  return restored['params']['params']


def maxtext(decoder, **options):
  shapes = {
    'token_embedder': {'embedding': (9, EMBED)},
    'decoder': {'decoder_norm': {'scale': (EMBED,)}, **decoder},
  }
  options = {'save': maxtext_save, 'root': 'params/params', **options}
  return Layout(shapes=shapes, restore=maxtext_restore, **options)


def block(*stack):
  """A layer, or layers stacked along axis 1."""
  return {
    'mlp': {'wi_0': {'kernel': (EMBED, *stack, MLP)}},
    'pre_self_attention_layer_norm': {'scale': (EMBED, *stack)},
  }


# Linen: a whole TrainState is saved; its parameters are put into a new one.


def train_state_of(tree):
  return train_state.TrainState.create(
    apply_fn=lambda: None, params=tree, tx=optax.adam(1e-3)
  )


def linen_restore(path, tree):
  state = train_state_of(tree)
  restored = standard_restore(path, {'params': state.params})
  return state.replace(**restored).params


# flax nnx: a State, whose leaves end in `value`, or its pure dictionary.


def nnx_state(tree):
  counts = {'rngs': {'count': nnx.RngCount(np.uint32(3))}}
  return nnx.State(jax.tree.map(nnx.Param, tree) | counts)


def nnx_restore(path, tree):
  return to_params(standard_restore(path, nnx_state(tree)))


def to_params(restored):
  assert restored['rngs']['count'].get_value() == 3
  del restored['rngs']
  return nnx.to_pure_dict(restored)


# Tunix: an item of a CheckpointManager for the State of the model, another for
# that of its optimizer.


def tunix_manager(path):
  items = ('model_params', 'optimizer_state')
  handlers = {item: ocp.PyTreeCheckpointHandler() for item in items}
  handlers['custom_metadata'] = ocp.JsonCheckpointHandler()
  return ocp.CheckpointManager(path, item_handlers=handlers)


def tunix_save(path, tree):
  moments = {'0': {'count': np.int32(2), 'mu': tree, 'nu': tree}}
  optimizer = jax.tree.map(
    nnx.OptState, {'opt_state': moments, 'step': np.uint32(2)}
  )
  with tunix_manager(path) as manager:
    for step in (1, 2):
      manager.save(
        step,
        args=ocp.args.Composite(
          model_params=ocp.args.PyTreeSave(nnx_state(tree)),
          optimizer_state=ocp.args.PyTreeSave(nnx.State(optimizer)),
        ),
        custom_metadata={},
      )


def tunix_restore(path, tree):
  target = jax.tree.map(jnp.asarray, nnx_state(tree))
  args = ocp.args.PyTreeRestore(
    item=target,
    restore_args=ocp.checkpoint_utils.construct_restore_args(target),
  )
  with tunix_manager(path) as manager:
    restored = manager.restore(
      manager.latest_step(), args=ocp.args.Composite(model_params=args)
    )
  return to_params(restored.model_params)


# T5X: the optimizer's view of things.


def t5x_save(path, tree):
  ocp.PyTreeCheckpointer().save(
    path, {'target': tree, 'state': {'step': 5, 'param_states': {'v': tree}}}
  )


def t5x_restore(path, tree):
  target = {'target': abstract(tree)}
  return ocp.PyTreeCheckpointer().restore(path, item=target)['target']


# CheckpointManager with an item for each thing.


def items_save(path, tree):
  with ocp.CheckpointManager(path) as manager:
    for step in (10, 20):
      manager.save(
        step,
        args=ocp.args.Composite(
          params=ocp.args.StandardSave(tree),
          opt_state=ocp.args.StandardSave({'mu': tree}),
          metrics=ocp.args.JsonSave({'loss': 0.5}),
        ),
      )


def items_restore(path, tree):
  with ocp.CheckpointManager(path) as manager:
    args = ocp.args.Composite(params=ocp.args.StandardRestore(abstract(tree)))
    return manager.restore(manager.latest_step(), args=args).params


# Without OCDBT: every array in a directory of its own, read by TensorStore.


def directories_save(path, tree):
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False)
  state = {'model': tree, 'optimizer': {'mu': tree}, 'training_key': np.ones(2)}
  ocp.Checkpointer(handler).save(path, args=ocp.args.PyTreeSave(state))


def directories_restore(path, tree):
  def read(keys, leaf):
    name = jax.tree_util.keystr(keys, simple=True, separator='.')
    store = {'driver': 'file', 'path': f'{path}/model.{name}'}
    opened = ts.open({'driver': 'zarr', 'kvstore': store}, read=True).result()
    return opened.read().result()

  return jax.tree.map_with_path(read, tree)


LAYOUTS = {
  'maxtext_scanned': maxtext({'layers': block(LAYERS)}),
  'maxtext_unscanned': maxtext(
    {f'layers_{i}': block() for i in range(LAYERS)},
    save=lambda path, tree: maxtext_save(path, tree, scanned=False),
  ),
  # Cycles of six layers, each with a stack of its own, then those left over.
  'gemma3_cycle': maxtext(
    {
      'layers': {f'layers_{i}': block(2) for i in range(6)},
      'layers_remainder': {f'layers_{i}': block() for i in range(2)},
    }
  ),
  'two_scan_axes': maxtext(
    {'scanned_blocks': {'layers': block(2, LAYERS)}},
    stacked_axes={r'.*/scanned_blocks/.*': (1, 2)},
  ),
  'nnx_aux': maxtext(
    {'layers': block(LAYERS)},
    save=lambda path, tree: maxtext_save(
      path, tree, nnx_aux={'dropout': {'count': np.uint32(3)}}
    ),
    kept=('nnx_aux/dropout/count',),
  ),
  'linen_train_state': Layout(
    {'layers': {'kernel': (LAYERS, EMBED, MLP), 'bias': (LAYERS, MLP)}},
    save=lambda path, tree: standard_save(path, train_state_of(tree)),
    restore=linen_restore,
    stacked_axes={r'.*/layers/.*': 0},
  ),
  'nnx_state': Layout(
    {'blocks': {'0': {'kernel': (EMBED, MLP)}, '1': {'kernel': (EMBED, MLP)}}},
    save=lambda path, tree: standard_save(path, nnx_state(tree)),
    restore=nnx_restore,
    root='',
    kept=('rngs/count/value',),
  ),
  'tunix': Layout(
    {'layers': {'0': {'w': (EMBED, MLP)}, '1': {'w': (EMBED, MLP)}}},
    save=tunix_save,
    restore=tunix_restore,
    root='',
    kept=('rngs/count/value',),
  ),
  'nnx_pure_dict': Layout(
    {'blocks': {0: {'kernel': (EMBED, MLP)}, 1: {'kernel': (EMBED, MLP)}}},
    save=standard_save,
    restore=standard_restore,
    root='',
  ),
  'gemma_flat_keys': Layout(
    {
      'transformer/embedder': {'input_embedding': (9, EMBED)},
      'transformer/layer_0/attn/q_einsum': {'w': (2, EMBED, 3)},
      'transformer/layer_0/mlp': {'gating_einsum': (2, EMBED, MLP)},
    },
    save=standard_save,
    restore=standard_restore,
    root='',
  ),
  'gemma_stacked': Layout(
    {
      'transformer/embedder': {'input_embedding': (9, EMBED)},
      'transformer/stacked_layers/attention_type_0/mlp/linear': {
        'w': (LAYERS, MLP, EMBED)
      },
      'transformer/stacked_layers/attention_type_1/pre_ffw_norm': {
        'scale': (2, EMBED)
      },
    },
    save=standard_save,
    restore=standard_restore,
    root='',
  ),
  't5x': Layout(
    {'decoder': {'layers': block(LAYERS)}},
    save=t5x_save,
    restore=t5x_restore,
    root='target',
    stacked_axes={r'target/decoder/layers/.*': 1},
  ),
  'items': Layout(
    {'dense': {'kernel': (EMBED, MLP), 'bias': (MLP,)}},
    save=items_save,
    restore=items_restore,
    root='',
  ),
  'v1': Layout(
    {'dense': {'kernel': (EMBED, MLP), 'bias': (MLP,)}},
    save=v1.save,
    restore=v1.load,
    root='',
  ),
  'directories': Layout(
    {'transformer': {'h': {'stacked': {'kernel': (LAYERS, EMBED, MLP)}}}},
    save=directories_save,
    restore=directories_restore,
    root='model',
    stacked_axes={r'.*/stacked/.*': 0},
  ),
}


@pytest.mark.parametrize('name', LAYOUTS)
def test_merged_and_restored(tmp_path, name):
  layout = LAYOUTS[name]
  paths = [tmp_path / model for model in ('base', 'one', 'two')]
  for number, path in enumerate(paths):
    layout.save(path, params(layout, number))
  report = mk.merge_checkpoints(
    mk.task_arithmetic(SCALE),
    base=paths[0],
    experts=paths[1:],
    output=tmp_path / 'out',
    stacked_axes=layout.stacked_axes,
  )
  expected = checkpoints.leaves(merged(layout))
  zeros = jax.tree.map(jnp.zeros_like, params(layout, 0))
  restored = layout.restore(tmp_path / 'out', zeros)
  compare.same_bits(checkpoints.leaves(restored), expected)

  base, output = map(mk.open_checkpoint, (paths[0], tmp_path / 'out'))
  prefix = f'{layout.root}/' if layout.root else ''
  # A State calls its leaves `value`.
  written = {path.removesuffix('/value') for path in output.specs}
  kept = {path.removesuffix('/value') for path in layout.kept}
  assert written == {prefix + path for path in expected} | kept
  said = checkpoints.leaves(eval(report.restore, {'orbax': orbax}))
  assert {path.removesuffix('/value') for path in said} == written
  assert output.specs.items() <= base.specs.items()
  assert output.layout == base.layout
  assert output.metadata.items() >= base.metadata.items()


@pytest.mark.parametrize(
  'name, stack, axis',
  [('gemma3_cycle', '/layers/', 1), ('gemma_stacked', '/stacked_layers/', 0)],
)
def test_stacks_are_known_and_what_lies_beside_is_none(
  tmp_path, name, stack, axis
):
  """MaxText's cycle of layers, and what Gemma's own library stacks."""
  layout = LAYOUTS[name]
  layout.save(tmp_path / 'base', params(layout, 0))
  made = job.make_job([mk.average()], [tmp_path / 'base'], None)
  tensors = [t for scope in made.plan.scopes for t in scope.tensors]
  assert {t.stacked for t in tensors if stack in t.path} == {(axis,)}
  assert {t.stacked for t in tensors if stack not in t.path} == {()}


STACKED_FIRST = {
  'wi': {'kernel': (LAYERS, EMBED, MLP)},
  'wo': {'kernel': (LAYERS, MLP, EMBED)},
}


@pytest.mark.parametrize(
  'decoder,known',
  [
    ({'dense_layers': block(2), 'moe_layers': block(LAYERS)}, 4),
    ({'layers': STACKED_FIRST}, 0),
    ({'dense_layers': STACKED_FIRST, 'moe_layers': block(LAYERS)}, 2),
    ({'layers': {'kernel': (EMBED, LAYERS, MLP), 'alpha': (LAYERS,)}}, 0),
    ({'layers': {'local_layers': block(2, LAYERS), 'post': block(2)}}, 2),
  ],
  ids=['two', 'axis 0', 'one of axis 0', 'a vector', 'nested'],
)
def test_no_axis_is_assumed_that_leaves_contradict(tmp_path, decoder, known):
  """MaxText does not say over which axis it scans; most models over axis 1."""
  layout = maxtext(decoder)
  layout.save(tmp_path / 'base', params(layout, 0))
  rule = mk.ties(density=0.5, scope='tensor')
  plan = job.make_job([rule], [tmp_path / 'base'], tmp_path / 'base').plan
  tensors = [
    tensor
    for scope in plan.scopes
    for tensor in scope.tensors
    if 'layers/' in tensor.path
  ]
  assert [t.stacked for t in tensors if t.stacked] == [(1,)] * known
  unknown = [t for t in tensors if not t.stacked and len(t.shape) > 1]
  warnings = caveats.of_plan(plan, 1, 0)
  assert len(warnings) == bool(unknown)
  assert all(
    re.match(f'{len(unknown)} tensors? below "layers"', w) for w in warnings
  )


def test_what_need_not_be_steps_of_one_model(tmp_path):
  """A number alone is a step; what else ends in a number may be a model."""
  for name in ('math_1', 'code_2'):
    standard_save(tmp_path / name, {'w': np.ones(3)})
  with pytest.raises(ValueError, match='holds code_2, math_1, which need not'):
    mk.open_checkpoint(tmp_path)
  for number in (1000, 2000):
    standard_save(tmp_path / str(number), {'w': np.ones(number // 1000)})
  standard_save(tmp_path / 'best_5000', {'w': np.ones(5)})
  assert mk.open_checkpoint(tmp_path).specs['w'].shape == (2,)


def test_a_step_by_the_name_of_where_one_is(tmp_path, monkeypatch):
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    manager.save(7, args=ocp.args.Composite(w=ocp.args.StandardSave({'a': 1})))
  expected = mk.open_checkpoint(tmp_path / 'run/7/w').layout
  monkeypatch.chdir(tmp_path / 'run/7')
  assert mk.open_checkpoint('w').layout == expected
  monkeypatch.chdir(tmp_path / 'run/7/w')
  assert mk.open_checkpoint('.').layout == expected


@pytest.mark.parametrize(
  'given, beside',
  [
    ('3', 'run has the steps …, 2, 4, 5, 6, 7, 8, 9, 10'),
    ('10/state', 'run/10 has the items opt_state, params'),
    ('1/state', 'run/1 has the item params'),
  ],
)
def test_what_lies_beside_a_path_is_named(tmp_path, given, beside):
  save = lambda *names: ocp.args.Composite(
    **{name: ocp.args.StandardSave({'w': np.ones(2)}) for name in names}
  )
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    for step in (1, 2, *range(4, 10)):
      manager.save(step, args=save('params'))
    manager.save(10, args=save('params', 'opt_state'))
  path = tmp_path / 'run' / given
  with pytest.raises(FileNotFoundError) as caught:
    mk.open_checkpoint(path)
  assert str(caught.value) == (
    f'There is no checkpoint at {path}, but {tmp_path}/{beside}.'
  )
