"""The streamed merge: the same model as in memory, and what it writes."""

import contextlib
import functools
import json
import math
import os
import threading

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1
import pytest
from safetensors.numpy import save_file
import tensorstore as ts

import mergekit_jax as mk
from mergekit_jax.checkpoint import orbax_write
from mergekit_jax.jobs import job
from mergekit_jax.rule import scope_of
from mergekit_jax.streaming import stream
from tests import cases, checkpoints, compare, models

SEED = 5
# Large enough to be cut, between its layers along axis 1 and within them: no
# box is made smaller than 64 KiB of one model. The halves are of one shape, as
# each one costs the random methods seconds of compilation.
LARGE = {'layers/kernel': (300, 3, 97), 'odd': (7, 5)}
STACKED = {r'.*/layers/.*': 1}
# Sharded by rule: by default no part is made smaller than 64 KiB.
UNEVEN = {'dense/kernel': (17, 11), 'odd': (7, 5)}
PARTITIONS = {
  'fsdp': {r'.*/dense/kernel': jax.P('fsdp')},
  '2d': {r'.*/dense/kernel': jax.P('fsdp', 'tensor')},
}
SHAPES = {'large': LARGE, 'uneven': UNEVEN, 'small': models.SMALL}

TIES_OF_TENSORS = next(
  case for case in cases.VARIANTS if case.name == 'ties_tensor_weighted'
)


@pytest.fixture(scope='module')
def saved(tmp_path_factory):
  """`saved(shapes, dtype, compress)` gives (base, experts) as paths."""

  @functools.cache
  def get(name, dtype='float32', compress=False):
    directory = tmp_path_factory.mktemp(name)
    shapes = SHAPES[name]
    return checkpoints.save_set(directory, shapes, dtype, compress=compress)

  return get


@functools.cache
def in_memory(case, name, dtype='float32'):
  base, experts = models.trees(SHAPES[name], dtype)
  stacked = STACKED if name == 'large' else None
  rule, experts = case.rule, experts[: case.experts]
  merged = mk.merge(rule, experts, base, key=SEED, stacked_axes=stacked)
  return models.unnest(merged)


def check(case, output, name, dtype='float32'):
  """Bitwise, or for Gram methods within 2 float32 ulp."""
  got, expected = checkpoints.load_floats(output), in_memory(case, name, dtype)
  if case.family == 'gram' and dtype == 'float32':
    _, experts = models.flat(SHAPES[name], dtype)
    compare.within_ulps(got, expected, 2, *experts)
    assert got.keys() == expected.keys()
  else:
    compare.same_bits(got, expected)


def merge(paths, output, case, **options):
  base, experts = paths
  return mk.merge_checkpoints(
    case.rule,
    base=base,
    experts=experts[: case.experts],
    output=output,
    seed=SEED,
    **options,
  )


def budget_to_cut(case):
  """Bytes that hold half a layer of LARGE, but no whole one.

  A layer is too small to be shared out, so all 8 devices compute all of it.
  The partial sums of a threshold, 2^16 counts an expert, come on top: 4 copies
  in 32 bits, or in 64 bits once they are added over layers.
  """
  if case.family != 'threshold':
    return 4_500_000
  return 11_500_000 if scope_of(case.rule) == 'model' else 8_500_000


class TestSameAsInMemory:
  @pytest.mark.parametrize('case', [*cases.METHODS, TIES_OF_TENSORS], ids=repr)
  def test_in_blocks(self, saved, tmp_path, case):
    base, experts = saved('large')
    options = {
      'memory_budget': budget_to_cut(case),
      'stacked_axes': STACKED,
    }
    plan = job.make_job(
      [case.rule], experts[: case.experts], base, **options
    ).plan
    boxes = {
      tensor.path: [box.shape for box in tensor.boxes]
      for scope in plan.scopes
      for tensor in scope.tensors
    }
    assert boxes['params/layers/kernel'] == 6 * [(150, 1, 97)]
    report = merge(saved('large'), tmp_path / 'out', case, **options)
    assert report.rounds == case.rounds
    reads = dict.fromkeys(boxes, case.rounds + 1) | {'params/steps': 1}
    if scope_of(case.rule) == 'tensor':
      reads['params/odd'] = 1  # whole in its box
    assert report.units_done == sum(map(len, boxes.values()))
    assert report.units_resumed == 0
    bytes_of = lambda path, size: (
      4 * size * (1 if path == 'steps' else 1 + case.experts)
    )
    sizes = {name: math.prod(shape) for name, shape in LARGE.items()}
    assert report.bytes_read == sum(
      reads[f'params/{name}'] * bytes_of(name, size)
      for name, size in (sizes | {'steps': 3}).items()
    )
    assert report.bytes_read == plan.bytes_read
    assert report.bytes_written == 4 * (sum(sizes.values()) + 3)
    check(case, tmp_path / 'out', 'large')

  @pytest.mark.parametrize('mesh', ['fsdp', '2d'])
  @pytest.mark.parametrize('case', cases.FAMILIES, ids=repr)
  def test_on_a_mesh(self, saved, tmp_path, case, mesh):
    """Eight devices on one axis or two; no dimension divides."""
    options = {
      'mesh': models.mesh(mesh),
      'partition_rules': PARTITIONS[mesh],
    }
    report = merge(saved('uneven'), tmp_path / 'out', case, **options)
    # The even part and what is left over, at each end that is sharded.
    boxes = {'fsdp': 2, '2d': 4}[mesh]
    assert report.units_done == boxes + len(['odd', 'steps'])
    check(case, tmp_path / 'out', 'uneven')

  def test_on_the_default_mesh(self, tmp_path):
    """A leaf of 64 KiB a device is spread over all devices unasked."""
    shapes = {'kernel': (1003, 136)}
    base, experts = checkpoints.save_set(tmp_path, shapes, experts=1)
    rule = mk.average()
    plan = job.make_job([rule], experts, base).plan
    (first, *_) = plan.scopes[0].tensors[0].boxes
    assert first.spec == jax.P(None, 'fsdp')
    report = mk.merge_checkpoints(
      rule, base=base, experts=experts, output=tmp_path / 'out'
    )
    assert report.provenance['mesh'] == {'fsdp': 8}
    merged = checkpoints.load_floats(tmp_path / 'out')
    _, (expert,) = models.flat(shapes, experts=1)
    compare.same_bits(merged, expert)

  @pytest.mark.parametrize('case', cases.FAMILIES, ids=repr)
  def test_bfloat16(self, saved, tmp_path, case):
    merge(saved('small', 'bfloat16'), tmp_path / 'out', case)
    check(case, tmp_path / 'out', 'small', 'bfloat16')

  @pytest.mark.parametrize('sources', ['all', 'experts'])
  @pytest.mark.parametrize('case', cases.FAMILIES, ids=repr)
  def test_from_safetensors(self, saved, tmp_path, case, sources):
    base, _ = saved('small')
    tree, trees = models.trees(models.SMALL)
    if sources == 'all':
      path = tmp_path / 'base.safetensors'
      base = checkpoints.save_safetensors(path, tree)
    experts = [
      checkpoints.save_safetensors(tmp_path / f'{i}.safetensors', expert)
      for i, expert in enumerate(trees)
    ]
    merge((base, experts), tmp_path / 'out', case, format='orbax')
    check(case, tmp_path / 'out', 'small')
    np.testing.assert_array_equal(
      checkpoints.load(tmp_path / 'out')['params/steps'], np.arange(3)
    )

  @pytest.mark.parametrize('name', ['average', 'ties'])
  def test_from_compressed_chunks(self, saved, tmp_path, name):
    (case,) = [case for case in cases.METHODS if case.name == name]
    merge(
      saved('large', compress=True),
      tmp_path / 'out',
      case,
      # What decoding takes comes on top.
      memory_budget=budget_to_cut(case) + 8 * 4 * 300 * 3 * 97,
      stacked_axes=STACKED,
    )
    check(case, tmp_path / 'out', 'large')

  def test_seed(self, saved, tmp_path):
    base, experts = saved('small')
    rule = mk.dare(0.5)
    merged = {}
    for name, seed in {'a': 1, 'b': 1, 'c': 2}.items():
      mk.merge_checkpoints(
        rule, base=base, experts=experts, output=tmp_path / name, seed=seed
      )
      merged[name] = checkpoints.load_floats(tmp_path / name)
    compare.same_bits(merged['a'], merged['b'])
    kernels = [merged[name]['dense/kernel'] for name in 'ac']
    assert (kernels[0] != kernels[1]).any()

  @pytest.mark.parametrize('zarr3', [False, True])
  def test_compressed_output(self, saved, tmp_path, monkeypatch, zarr3):
    """No chunk is written in parts, though none divides its array."""
    boxes = []
    start = orbax_write._Writer._start

    def noted(writer, path, box, block):
      boxes.append((path, [(s.start, s.stop) for s in box]))
      return start(writer, path, box, block)

    monkeypatch.setattr(orbax_write._Writer, '_start', noted)
    case = cases.FAMILIES[0]
    options = {'mesh': models.mesh('2d'), 'partition_rules': PARTITIONS['2d']}
    options |= {'zarr3': zarr3, 'compression': 'zstd'}
    merge(saved('uneven'), tmp_path / 'out', case, **options)
    check(case, tmp_path / 'out', 'uneven')

    def opened(path):
      kvstore = {'driver': 'ocdbt', 'base': f'file://{tmp_path}/out/'}
      kvstore['path'] = path.replace('/', '.') + '/'
      driver = 'zarr3' if zarr3 else 'zarr'
      return ts.open({'driver': driver, 'kvstore': kvstore}).result()

    stores = {path: opened(path) for path, _ in boxes}
    for path, bounds in boxes:
      store = stores[path]
      assert 'zstd' in str(store.codec)
      chunk = store.chunk_layout.write_chunk.shape
      for (first, end), step, size in zip(
        bounds, chunk, store.shape, strict=True
      ):
        assert first % step == 0 and (end % step == 0 or end == size)
    kernel = stores['params/dense/kernel']
    assert kernel.chunk_layout.write_chunk.shape == (4, 5)
    assert sum(path == 'params/dense/kernel' for path, _ in boxes) > 8


# Small trees of one leaf each that the tests of the layout share.
KERNEL = np.arange(12, dtype=np.float32).reshape(3, 4)
BIAS = np.ones(4, np.float32)
COUNT = np.int32(9)


def params(shift=0.0):
  return {
    'dense': {'kernel': KERNEL + np.float32(shift), 'bias': BIAS},
    'count': COUNT,
  }


def state(shift=0.0):
  """What a training loop saves."""
  return {
    'params': params(shift),
    'opt_state': {'mu': {'dense': {'kernel': KERNEL}}, 'count': COUNT},
    'step': np.int32(1000),
    'rng': np.asarray([1, 2], np.uint32),
    'nnx_aux': {'rngs': {'key': np.asarray([3, 4], np.uint32)}, 'half': BIAS},
  }


class TestOutput:
  """The base's tree from its root down, at the same path."""

  @pytest.fixture(autouse=True)
  def _directory(self, tmp_path):
    self.directory = tmp_path
    self.output = tmp_path / 'out'

  def save(self, name, tree, **options):
    return checkpoints.save(self.directory / name, tree, **options)

  def average(self, base, *experts, **options):
    return mk.merge_checkpoints(
      mk.average(), base=base, experts=experts, output=self.output, **options
    )

  def test_training_state(self):
    base = self.save('base', state())
    report = self.average(
      base, self.save('one', state(1)), self.save('two', state(2))
    )
    merged = checkpoints.load(self.output)
    expected = {
      'params/dense/kernel': KERNEL + np.float32(1.5),
      'params/dense/bias': BIAS,
      'params/count': COUNT,
      'nnx_aux/rngs/key': np.asarray([3, 4], np.uint32),
      'nnx_aux/half': BIAS,
    }
    compare.same_bits(merged, expected)
    assert sorted(report.copied) == [
      'nnx_aux/half',
      'nnx_aux/rngs/key',
      'params/count',
    ]
    assert [tensor.path for tensor in report.tensors] == [
      'params/dense/bias',
      'params/dense/kernel',
    ]

  @pytest.mark.parametrize(
    'wrap',
    [
      lambda tree: tree,
      lambda tree: {'params': {'params': tree}},
      lambda tree: {'model': tree, 'step': np.int32(1)},
      lambda tree: {'target': tree},
    ],
    ids=['bare', 'params/params', 'model', 'target'],
  )
  def test_experts_with_another_root(self, wrap):
    """The output has the base's root, whatever the experts have."""
    base = self.save('base', state())
    self.average(base, self.save('one', wrap(params(1))))
    merged = checkpoints.load(self.output)
    np.testing.assert_array_equal(merged['params/dense/kernel'], KERNEL + 1)
    assert {path for path in merged if not path.startswith('nnx_aux')} == {
      'params/dense/kernel',
      'params/dense/bias',
      'params/count',
    }

  @pytest.mark.parametrize(
    'wrap,root',
    [
      (lambda state: {'state': state, 'data': BIAS}, 'state/params'),
      (lambda state: {'model': state}, 'model/params'),
      # As nnx names the parts of a model and its optimizer.
      (
        lambda state: {
          '0': state['params'],
          '1': {'opt_state': state['opt_state'], 'step': COUNT},
        },
        '0',
      ),
    ],
    ids=['state', 'model', 'nnx'],
  )
  def test_a_training_state_below_a_key(self, wrap, root):
    """What an optimizer keeps is never merged, and has no part in a trim."""
    saved = [self.save(f's{i}', wrap(state(i))) for i in range(3)]
    bare = [self.save(f'p{i}', {'params': params(i)}) for i in range(3)]
    merge = lambda paths, output: mk.merge_checkpoints(
      mk.ties(density=0.3), base=paths[0], experts=paths[1:], output=output
    )
    report = merge(saved, self.output)
    expected = merge(bare, self.directory / 'bare')
    merged = checkpoints.load(self.output)
    assert {t.path for t in report.tensors} == {
      f'{root}/dense/kernel',
      f'{root}/dense/bias',
    }
    assert merged.keys() - {'1/step'} == {
      t.path.replace('params', root) for t in expected.tensors
    } | {f'{root}/count'}
    for name in ('dense/kernel', 'dense/bias'):
      np.testing.assert_array_equal(
        merged[f'{root}/{name}'],
        checkpoints.load(self.directory / 'bare')[f'params/{name}'],
      )

  def test_modules_beside_a_model(self):
    """They are part of what is merged; an optimizer beside them is not."""
    whole = lambda shift: {
      'model': params(shift),
      'lm_head': {'kernel': KERNEL + np.float32(shift)},
      'opt_state': {'mu': KERNEL},
    }
    base, *experts = (self.save(f's{i}', whole(i)) for i in range(3))
    self.average(base, *experts)
    merged = checkpoints.load(self.output)
    assert merged.keys() == {
      'model/dense/kernel',
      'model/dense/bias',
      'model/count',
      'lm_head/kernel',
    }
    for path in ('model/dense/kernel', 'lm_head/kernel'):
      np.testing.assert_array_equal(merged[path], KERNEL + np.float32(1.5))

  def test_a_module_that_is_called_optimizer(self):
    """Below a root of their own all leaves are parameters."""
    whole = lambda shift: {
      'params': params(shift) | {'optimizer': {'kernel': KERNEL + shift}},
      'opt_state': {'mu': KERNEL},
    }
    experts = [self.save(f's{i}', whole(np.float32(i))) for i in range(2)]
    self.average(None, *experts)
    merged = checkpoints.load(self.output)
    path = 'params/optimizer/kernel'
    np.testing.assert_array_equal(merged[path], KERNEL + np.float32(0.5))
    assert not [path for path in merged if path.startswith('opt_state')]

  @pytest.mark.parametrize(
    'codes,warned',
    [
      (np.zeros((64, 64), np.int8), ['1 leaf of whole numbers is copied']),
      (np.zeros((8, 8), np.int8), []),
      (np.zeros(5000, np.int64), []),
    ],
    ids=['codes', 'few', 'row'],
  )
  def test_warns_of_codes_that_are_copied(self, codes, warned):
    tree = {'params': {'qweight': codes, 'scales': np.ones(3, np.float16)}}
    report = self.average(None, self.save('quantised', tree))
    assert len(report.warnings) == len(warned)
    assert all(w in r for w, r in zip(warned, report.warnings, strict=True))

  def test_warns_of_float64(self):
    """Of which a task vector is lost that float32 does not see beside it."""
    base = self.save('base', {'w': np.ones(3)})
    expert = self.save('expert', {'w': np.ones(3) + 1e-9})
    report = self.average(base, expert)
    unmoved, wide = report.warnings
    assert 'all its task vectors are 0, in float32' in unmoved
    assert wide.startswith('1 leaf is stored in float64: w.')

  def test_warns_of_complex_numbers_that_are_copied(self):
    numbers = np.full((2, 3), 1 + 2j, np.complex64)
    tree = {'params': {'filter': numbers, 'w': np.ones(3, np.float32)}}
    base = self.save('base', tree)
    expert = self.save(
      'expert', {'params': tree['params'] | {'filter': -numbers}}
    )
    report = self.average(base, expert)
    unmoved, copied = report.warnings
    assert 'is the base in every merged tensor' in unmoved
    assert unmoved.endswith(' 1 leaf, params/filter, was not compared.')
    assert copied.startswith('1 leaf of complex numbers is copied')
    np.testing.assert_array_equal(
      checkpoints.load(self.output)['params/filter'], numbers
    )

  def test_warns_of_an_expert_that_is_given_twice(self):
    one, two = (self.save(name, state(1)) for name in ('one', 'two'))
    link = self.directory / 'link'
    link.symlink_to(one)
    report = self.average(None, one, two, link)
    assert [w.partition(' (')[0] for w in report.warnings] == [
      'experts[2] is experts[0] once more'
    ]

  def test_warns_of_scales_that_are_not_applied(self):
    weight = jnp.ones((4, 4), jnp.float8_e4m3fn)
    for name, count in (('weight_scale_inv', 1), ('bias_scale', 0)):
      tree = {'params': {'weight': weight, name: np.ones(3, np.float32)}}
      path = self.save(name, tree)
      report = mk.merge_checkpoints(
        mk.average(),
        experts=[path, path],
        output=self.directory / f'{name}-merged',
      )
      said = [
        w
        for w in report.warnings
        if '1 leaf of 8 bits has scales beside it' in w
      ]
      assert len(said) == count

  def test_numbers_that_lie_on_other_devices(self):
    """As those do that were learned in a training step."""
    base, *experts = (self.save(f's{i}', state(i)) for i in range(3))
    mesh = jax.make_mesh((4,), ('x',))
    placed = lambda value: jax.device_put(
      value, jax.NamedSharding(mesh, jax.P())
    )
    rule = mk.ties(placed(0.5), placed(0.25))
    mk.merge_checkpoints(
      mk.task_arithmetic(placed(0.5)),
      base=base,
      experts=experts,
      output=self.output,
      overrides={'.*/bias': rule, '.*/dense/.*': rule},
    )
    mk.merge_checkpoints(
      mk.ties(0.5, 0.25),
      base=base,
      experts=experts,
      output=self.directory / 'b',
    )
    compare.same_bits(
      checkpoints.load(self.output), checkpoints.load(self.directory / 'b')
    )

  def test_bare_base(self):
    """Without a root the whole tree is one of parameters."""
    base = self.save('base', {'a': KERNEL, 'step': COUNT})
    expert = self.save('one', state() | {'params': {'a': BIAS, 'step': COUNT}})
    with pytest.raises(ValueError, match='differ in 1 place and'):
      self.average(base, expert)
    expert = self.save('two', {'params': {'a': KERNEL + 2, 'step': COUNT}})
    self.average(base, expert)
    compare.same_bits(
      checkpoints.load(self.output), {'a': KERNEL + 2, 'step': COUNT}
    )

  def maxtext(self, name, shift):
    """<name>/0/items with params/params and the optimizer beside it."""
    tree = {
      'params': {'params': params(shift)},
      'opt_state': {'mu': KERNEL},
      'step': np.int32(4),
    }
    with ocp.CheckpointManager(
      self.directory / name, item_names=('items',)
    ) as manager:
      manager.save(0, args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)))
    return self.directory / name

  @pytest.mark.parametrize('given', ['.', '0', '0/items'])
  def test_item_of_a_manager(self, given):
    """A base X/0/items gives OUT/0/items, whichever of its paths is given."""
    base, expert = self.maxtext('base', 0), self.maxtext('one', 1)
    report = self.average(base / given, expert)
    assert report.provenance['sources']['base']['path'] == str(
      base / '0' / 'items'
    )
    place = self.output / '0' / 'items'
    assert f".restore('{place}')" in report.table()
    merged = checkpoints.load(place)
    expected = {
      'params/params/dense/kernel': KERNEL + 1,
      'params/params/dense/bias': BIAS,
      'params/params/count': COUNT,
    }
    compare.same_bits(merged, expected)
    with ocp.CheckpointManager(self.output, item_names=('items',)) as manager:
      assert manager.latest_step() == 0
      target = {'params': {'params': params()}}
      restored = manager.restore(
        0, args=ocp.args.Composite(items=ocp.args.PyTreeRestore(target))
      )
    compare.same_bits(checkpoints.leaves(restored['items']), expected)

  def test_manager(self):
    """The newest step, under the item name that StandardSave gives."""
    with ocp.CheckpointManager(self.directory / 'base') as manager:
      for step in (3, 12):
        tree = {'params': params(step)}
        manager.save(step, args=ocp.args.StandardSave(tree))
    expert = self.save('one', params(1))
    mk.merge_checkpoints(
      mk.task_arithmetic(0.0),
      base=self.directory / 'base',
      experts=[expert],
      output=self.output,
    )
    with ocp.CheckpointManager(self.output) as manager:
      assert manager.all_steps() == [12]
      restored = manager.restore(12, args=ocp.args.StandardRestore())
    np.testing.assert_array_equal(
      restored['params']['dense']['kernel'], KERNEL + 12
    )
    sources = checkpoints.report_of(self.output)['provenance']['sources']
    chosen = [sources[name]['path'] for name in ('base', 'experts[0]')]
    assert chosen == [f'{self.directory}/base/12/default', str(expert)]

  def test_no_step_among_those_of_a_manager(self):
    """Its manager would not find there what a step is."""
    run = self.directory / 'run'
    with ocp.CheckpointManager(run) as manager:
      manager.save(7, args=ocp.args.StandardSave({'params': params()}))
    expert = self.save('one', params(1))
    merge = lambda output: mk.merge_checkpoints(
      mk.average(), base=run / '7', experts=[expert], output=output
    )
    with pytest.raises(ValueError, match=r'such as .*/run-merged\.'):
      merge(run / '31')
    merge(self.directory / '31')
    assert [child.name for child in run.iterdir()] == ['7']

  def test_no_step_among_those_of_a_manager_with_a_prefix(self):
    run = self.directory / 'run'
    options = ocp.CheckpointManagerOptions(step_prefix='checkpoint')
    with ocp.CheckpointManager(run, options=options) as manager:
      for step in (3, 10):
        manager.save(step, args=ocp.args.StandardSave({'params': params()}))
    expert = self.save('one', params(1))
    merge = lambda output: mk.merge_checkpoints(
      mk.average(), experts=[expert], output=output
    )
    with pytest.raises(ValueError, match=r'such as .*/run-merged\.'):
      merge(run / 'checkpoint_13')
    for name in ('best_13', 'checkpoint_best', 'checkpoint'):
      merge(run / name)
    with ocp.CheckpointManager(run, options=options) as manager:
      assert manager.all_steps() == [3, 10]

  def test_saves_and_outputs_that_are_numbered_are_no_steps(self):
    """The v1 API lays a save down as a step is, and so its output is."""
    v1.save(self.directory / 'model_1', {'w': KERNEL})
    for number in (2, 3):
      mk.merge_checkpoints(
        mk.average(),
        experts=[self.directory / 'model_1'],
        output=self.directory / f'model_{number}',
      )
    (merged,) = v1.load(self.directory / 'model_3').values()
    np.testing.assert_array_equal(merged, KERNEL)

  def test_restores_with_ordinary_orbax(self):
    base = self.save('base', {'params': params()})
    self.average(base, self.save('one', params(1)))
    mesh = jax.make_mesh((2, 4), ('a', 'b'))
    sharding = jax.NamedSharding(mesh, jax.P(None, 'b'))
    spec = jax.ShapeDtypeStruct((3, 4), np.float32, sharding=sharding)
    target = {
      'params': {
        'dense': {
          'kernel': spec,
          'bias': jax.ShapeDtypeStruct((4,), 'float32'),
        },
        'count': jax.ShapeDtypeStruct((), 'int32'),
      }
    }
    with ocp.StandardCheckpointer() as checkpointer:
      standard = checkpointer.restore(self.output, target)
    plain = ocp.PyTreeCheckpointer().restore(self.output)
    kernel = standard['params']['dense']['kernel']
    assert kernel.sharding.spec == jax.P(None, 'b')
    for restored in (standard, plain):
      compare.same_bits(
        checkpoints.leaves(restored),
        checkpoints.leaves({'params': params(1)}),
      )

  def test_dtype(self):
    base, experts = models.trees(models.SMALL, 'bfloat16', 2)
    paths = [self.save('base', base)]
    paths += [self.save(f'e{i}', tree) for i, tree in enumerate(experts)]
    self.average(*paths, dtype='float32')
    merged = checkpoints.load_floats(self.output)
    single = lambda leaf: np.asarray(leaf).astype(np.float32)
    # bfloat16 has 8 bits: the mean of two is exact in float32.
    one, two = models.flat(models.SMALL, 'bfloat16', 2)[1]
    expected = {n: (single(one[n]) + single(two[n])) / 2 for n in one}
    compare.same_bits(merged, expected)
    assert checkpoints.load(self.output)['params/steps'].dtype == np.int32

  def test_experts_of_other_dtypes(self):
    """Read as stored, rounded once to the base's."""
    base = self.save('base', {'params': params()})
    half = jax.tree.map(
      lambda x: x.astype(jnp.bfloat16) if x.dtype == np.float32 else x,
      params(2),
    )
    self.average(base, self.save('one', half), self.save('two', params(1)))
    merged = checkpoints.load(self.output)['params/dense/kernel']
    assert merged.dtype == np.float32
    np.testing.assert_array_equal(merged, KERNEL + np.float32(1.5))

  def test_float64(self):
    """The base's dtype, whatever jax is configured to."""
    wide = lambda shift: {
      'params': {'kernel': KERNEL.astype('float64') + shift}
    }
    base = self.save('base', wide(0))
    self.average(base, self.save('one', wide(1)), self.save('two', wide(2)))
    merged = checkpoints.load(self.output)['params/kernel']
    np.testing.assert_array_equal(merged, KERNEL + 1.5)

  def test_no_base(self):
    experts = [self.save(f'e{i}', state(i)) for i in (1, 4)]
    report = self.average(None, *experts)
    merged = checkpoints.load(self.output)
    np.testing.assert_array_equal(
      merged['params/dense/kernel'], KERNEL + np.float32(2.5)
    )
    assert merged['params/count'] == COUNT
    assert report.warnings == []
    assert set(report.provenance['sources']) == {'experts[0]', 'experts[1]'}

  def test_overrides(self):
    """The first match wins; each rule is a scope of its own."""
    base, experts = models.trees(models.STACKED, experts=2)
    paths = [self.save('base', base)]
    paths += [self.save(f'e{i}', tree) for i, tree in enumerate(experts)]
    report = mk.merge_checkpoints(
      mk.task_arithmetic(0.5),
      base=paths[0],
      experts=paths[1:],
      output=self.output,
      overrides={
        r'.*/layers/.*': 'base',
        r'params/(layers|odd).*': mk.average([1, 0]),
      },
    )
    merged = checkpoints.load_floats(self.output)
    base, experts = models.flat(models.STACKED, experts=2)
    compare.same_bits(
      merged,
      {'layers/kernel': base['layers/kernel'], 'odd': experts[0]['odd']},
    )
    assert report.copied == ['params/layers/kernel', 'params/steps']
    assert report.provenance['overrides'][r'.*/layers/.*'] == "'base'"

  def test_what_is_kept_need_not_be_alike(self):
    """Such as the embedding of an expert whose vocabulary was extended."""
    base, others = models.trees(models.SMALL, 'float32', 2)
    others[0]['params']['odd'] = np.zeros((9, 5), np.float32)
    del others[1]['params']['odd']
    paths = [self.save('base', base)]
    paths += [self.save(f'e{i}', tree) for i, tree in enumerate(others)]
    merge = lambda overrides: self.average(*paths, overrides=overrides)
    with pytest.raises(ValueError, match='differ in 2 places'):
      merge(None)
    merge({'.*/odd': 'base'})
    merged = checkpoints.load(self.output)
    np.testing.assert_array_equal(merged['params/odd'], base['params']['odd'])

  def test_what_only_an_expert_has_is_named_and_left_out(self):
    """Such as an output layer that is tied in the base."""
    base, others = models.trees(models.SMALL, 'float32', 2)
    others[0]['params']['head'] = np.zeros((9, 5), np.float32)
    paths = [self.save('base', base)]
    paths += [self.save(f'e{i}', tree) for i, tree in enumerate(others)]
    with pytest.raises(ValueError, match='params/head: only in experts'):
      self.average(*paths, overrides={'.*/head': mk.average()})
    self.average(*paths, overrides={'.*/head': 'base'})
    assert (
      checkpoints.load(self.output).keys() == checkpoints.load(paths[0]).keys()
    )

  @pytest.mark.parametrize('use_ocdbt', [True, False])
  def test_random_keys_stay_random_keys(self, use_ocdbt):
    def tree(seed):
      keys = jax.random.split(jax.random.key(seed, impl='rbg'), 3)
      rngs = {'default': jax.random.key(seed), 'many': keys}
      return {'params': {'w': jnp.full((4, 8), seed, jnp.float32), 'r': rngs}}

    for name, seed in {'base': 3, 'expert': 4}.items():
      handler = ocp.PyTreeCheckpointHandler(use_ocdbt=use_ocdbt)
      ocp.Checkpointer(handler).save(
        self.directory / name, args=ocp.args.PyTreeSave(tree(seed))
      )
    self.average(self.directory / 'base', self.directory / 'expert')
    with ocp.PyTreeCheckpointer() as checkpointer:
      merged = checkpointer.restore(self.output.absolute())
    assert (merged['params']['w'] == 4).all()
    rngs = tree(3)['params']['r']
    for name, key in merged['params']['r'].items():
      assert key.dtype == rngs[name].dtype and (key == rngs[name]).all()

  @pytest.mark.parametrize('place', ['item', 'manager'])
  def test_scanned_layers_are_recognised(self, place):
    """MaxText says in its metadata that layers lie along axis 1."""
    random = np.random.default_rng(0)
    # Layers of very different sizes: one threshold for all is another model.
    sizes = np.asarray([1, 100], np.float32)[:, None]
    values = lambda: random.normal(size=(5, 2, 6)).astype(np.float32) * sizes
    trees = [
      {
        'params': {
          'params': {'decoder': {'layers': {'mlp': {'kernel': values()}}}}
        }
      }
      for _ in range(3)
    ]
    metadata = {'scan_layers': True}
    paths = []
    for i, tree in enumerate(trees):
      path = self.directory / f'model{i}'
      if place == 'item':
        path = path / '0' / 'items'
        checkpoints.save(path, tree, metadata=metadata)
      else:
        with ocp.CheckpointManager(path, item_names=('items',)) as manager:
          manager.save(
            0,
            args=ocp.args.Composite(items=ocp.args.PyTreeSave(tree)),
            custom_metadata=metadata,
          )
      paths.append(path)
    rule = mk.ties(density=0.5, scope='tensor')
    mk.merge_checkpoints(
      rule, base=paths[0], experts=paths[1:], output=self.output
    )
    item = self.output if place == 'item' else self.output / '0' / 'items'
    (merged,) = checkpoints.load(item).values()
    whole = mk.merge(rule, trees[1:], trees[0])
    by_layer = mk.merge(
      rule, trees[1:], trees[0], stacked_axes={r'.*/layers/.*': 1}
    )
    (whole,), (by_layer,) = jax.tree.leaves(whole), jax.tree.leaves(by_layer)
    np.testing.assert_array_equal(merged, by_layer)
    assert (merged != np.asarray(whole)).any()


class TestReport:
  def test_numbers(self, saved, tmp_path):
    """Norms, densities and sign conflicts, recomputed in numpy."""
    base, experts = saved('large')
    density = 0.3
    # In blocks, so that they add up over units.
    report = mk.merge_checkpoints(
      mk.ties(density, scope='tensor'),
      base=base,
      experts=experts,
      output=tmp_path / 'out',
      memory_budget=4_500_000,
      stacked_axes=STACKED,
    )
    values, others = models.flat(LARGE)
    merged = checkpoints.load_floats(tmp_path / 'out')
    assert [t.path for t in report.tensors] == [f'params/{n}' for n in LARGE]
    for tensor in report.tensors:
      name = tensor.path.removeprefix('params/')
      base_leaf = np.asarray(values[name])
      deltas = np.stack([np.asarray(o[name]) - base_leaf for o in others])
      assert tensor.shape == base_leaf.shape
      norm = lambda x: np.sqrt(np.sum(np.square(x, dtype=np.float64)))
      np.testing.assert_allclose(
        tensor.task_vector_norms, [norm(d) for d in deltas], rtol=1e-6
      )
      np.testing.assert_allclose(
        tensor.merge_norm, norm(merged[name] - base_leaf), rtol=1e-6
      )
      # As for the others: squares are added along rows in float32.
      np.testing.assert_allclose(tensor.base_norm, norm(base_leaf), rtol=1e-6)
      # [experts, layers, elements]
      slices = deltas.reshape(3, 1, -1)
      if name == 'layers/kernel':
        slices = np.moveaxis(deltas, 2, 1).reshape(3, 3, -1)
      size = slices.shape[-1]
      ranks = size - round(1e6 * density) * size // 10**6
      cuts = np.partition(np.abs(slices), ranks, axis=-1)[..., ranks]
      kept = np.abs(slices) >= cuts[..., None]
      np.testing.assert_allclose(
        tensor.ratios['density'], kept.mean((1, 2)), rtol=1e-12
      )
      up, down = (kept & (slices > 0)).any(0), (kept & (slices < 0)).any(0)
      np.testing.assert_allclose(
        tensor.ratios['sign_conflict'],
        (up & down).sum() / (up | down).sum(),
        rtol=1e-12,
      )
      assert tensor.rounding == [0, 0, 0]
    table = report.table()
    assert '2 tensors merged, 1 copied' in table and 'density: 0.30' in table

  def test_an_expert_of_another_base(self, tmp_path):
    random = np.random.default_rng(0)
    draw = lambda: random.standard_normal((8, 9)).astype('float32')
    base = draw()
    models = {'base': base, 'tuned': base + 0.1 * draw(), 'other': draw()}
    paths = [
      checkpoints.save(tmp_path / name, {'w': leaf})
      for name, leaf in models.items()
    ]
    report = mk.merge_checkpoints(
      mk.average(), base=paths[0], experts=paths[1:], output=tmp_path / 'out'
    )
    (warning,) = report.warnings
    norms = [np.linalg.norm(x) for x in (models['other'] - base, base)]
    assert warning.startswith('experts[1] ')
    assert '{:.4g} and {:.4g}.'.format(*norms) in warning

  def test_ratios_are_over_the_model(self, tmp_path):
    """What no expert moves does not dilute how often they conflict."""
    frozen = np.ones(16_000, np.float32)
    deltas = np.asarray([[1, 1, 0, -1], [1, -1, 2, 1]], np.float32)
    trees = [{'frozen': frozen, 'w': np.zeros(4, np.float32)}]
    trees += [{'frozen': frozen, 'w': delta} for delta in deltas]
    paths = [
      checkpoints.save(tmp_path / str(i), {'params': tree})
      for i, tree in enumerate(trees)
    ]
    report = mk.merge_checkpoints(
      mk.ties(density=0.5, scope='tensor'),
      base=paths[0],
      experts=[*paths[1:], paths[0]],
      output=tmp_path / 'out',
    )
    # Half of 4 are kept, with all that are as large; of 16,000 zeros none.
    assert report.ratios['density'] == pytest.approx((3 + 4) / (3 * 16_004))
    assert report.ratios['sign_conflict'] == pytest.approx(2 / 4)
    table = report.table()
    assert 'sign conflict: 0.5000' in table
    assert 'norms of the task vectors: 1.732 2.646 0' in table
    (warning,) = report.warnings
    assert warning.startswith(f'experts[2] ({paths[0]}) is the base in every')

  def test_layers_that_may_be_stacked(self, tmp_path):
    """Where it matters: for totals of a tensor, and for masks."""
    paths = [
      checkpoints.save(
        tmp_path / str(i), {'layers': {'w': np.full((2, 3), i, np.float32)}}
      )
      for i in range(3)
    ]

    def warnings(rule, **options):
      report = mk.merge_checkpoints(
        rule,
        base=paths[0],
        experts=paths[1:],
        output=tmp_path / 'out',
        overwrite=True,
        **options,
      )
      stacked = {'layers/w': [0]} if 'stacked_axes' in options else {}
      assert report.provenance['stacked_axes'] == stacked
      return [w for w in report.warnings if 'layers/w, is merged as one' in w]

    masked = {'layers/.*': mk.dare(0.5)}
    for rule in (mk.ties(scope='tensor'), mk.dare(0.5)):
      assert len(warnings(rule)) == 1
      assert not warnings(rule, stacked_axes={'layers/.*': 0})
      # What another rule merges does not count for it.
      assert not warnings(rule, overrides={'layers/.*': mk.average()})
    assert len(warnings(mk.average(), overrides=masked)) == 1
    assert not warnings(mk.ties()) and not warnings(mk.average())

  def test_what_models_say_is_logged_first_and_once(
    self, tmp_path, caplog, monkeypatch
  ):
    """Before hours of reading; what only the merge can tell, after them."""
    tree = {'layers': {'w': np.ones((2, 3), np.float32)}}
    path = checkpoints.save(tmp_path / 'one', tree)
    run, before = stream.run, []

    def watched(*arguments, **options):
      before.extend(record.getMessage() for record in caplog.records)
      return run(*arguments, **options)

    monkeypatch.setattr(stream, 'run', watched)
    with caplog.at_level('WARNING', logger='absl'):
      report = mk.merge_checkpoints(
        mk.dare(0.5), base=path, experts=[path], output=tmp_path / 'out'
      )
    # Other libraries may say something, too.
    ours = lambda said: [each for each in said if each in report.warnings]
    (unstacked,) = ours(before)
    assert 'layers/w, is merged as one' in unstacked
    unmoved = report.warnings[0]
    assert 'is the base in every' in unmoved
    said = ours(record.getMessage() for record in caplog.records)
    assert said == [unstacked, unmoved]
    assert sorted(said) == sorted(report.warnings)

  def test_without_a_base(self, saved, tmp_path):
    """Norms are those of the models."""
    _, experts = saved('small')
    report = mk.merge_checkpoints(
      mk.average(), experts=experts, output=tmp_path / 'out'
    )
    _, others = models.flat(models.SMALL)
    for tensor in report.tensors:
      name = tensor.path.removeprefix('params/')
      norms = [np.linalg.norm(np.ravel(other[name])) for other in others]
      np.testing.assert_allclose(tensor.task_vector_norms, norms, rtol=1e-6)
    assert 'norms of the experts: ' in report.table()

  def test_rounding(self, tmp_path):
    """A short fine-tune, stored in bfloat16, is mostly rounding."""
    random = np.random.default_rng(0)
    base = random.normal(size=(40, 50)).astype(np.float32)
    tuned = base + 1e-5 * random.normal(size=base.shape).astype(np.float32)
    far = base + random.normal(size=base.shape).astype(np.float32)
    models_by_name = {
      'base': base,
      'single': tuned,
      'short': tuned.astype(jnp.bfloat16),
      'long': far.astype(jnp.bfloat16),
    }
    paths = [
      checkpoints.save(tmp_path / name, {'params': {'kernel': leaf}})
      for name, leaf in models_by_name.items()
    ]
    report = mk.merge_checkpoints(
      mk.average(), base=paths[0], experts=paths[1:], output=tmp_path / 'out'
    )
    (warning,) = report.warnings
    assert warning.startswith(f'experts[1] ({paths[2]})')
    assert 'rounding of bfloat16' in warning and 'params/kernel' in warning
    assert '1 warning: in the log, and in the report' in report.table()
    (tensor,) = report.tensors
    # The rounding that is all of it, measured.
    rounded = np.linalg.norm(
      tuned.astype(jnp.bfloat16).astype(np.float32) - tuned
    )
    share = rounded / np.linalg.norm(
      tuned.astype(jnp.bfloat16).astype(np.float32) - base
    )
    assert tensor.rounding[0] < 0.01
    np.testing.assert_allclose(tensor.rounding[1], share, rtol=0.05)
    assert tensor.rounding[2] < 0.01

  def test_file(self, saved, tmp_path):
    base, experts = saved('small')
    report = mk.merge_checkpoints(
      mk.ties(density=0.25, scale=2.0),
      base=base,
      experts=experts,
      output=tmp_path / 'out',
      seed=7,
      overrides={'.*/odd': 'base'},
    )
    written = checkpoints.report_of(tmp_path / 'out')
    for name, value in vars(report).items():
      if name not in ('tensors', 'provenance'):
        assert written[name] == value, name
    assert [t['path'] for t in written['tensors']] == ['params/dense/kernel']
    assert written['provenance'] == json.loads(json.dumps(report.provenance))
    provenance = report.provenance
    assert '0.25' in provenance['method'] and '2.0' in provenance['method']
    assert provenance['seed'] == 7
    assert provenance['overrides'] == {'.*/odd': "'base'"}
    assert provenance['versions']['jax'] == jax.__version__
    assert provenance['versions']['mergekit_jax'] == mk.__version__
    sources = provenance['sources']
    assert {name: source['path'] for name, source in sources.items()} == {
      'base': str(base),
      **{f'experts[{i}]': str(path) for i, path in enumerate(experts)},
    }
    assert len({source['fingerprint'] for source in sources.values()}) == 4
    assert (
      mk.open_checkpoint(tmp_path / 'out').metadata['mergekit_jax']
      == (written['provenance'])
    )

  def test_nonfinite_numbers_are_valid_json(self, tmp_path):
    tree = {'params': {'kernel': np.asarray([1, np.nan], np.float32)}}
    path = checkpoints.save(tmp_path / 'model', tree)
    mk.merge_checkpoints(
      mk.average(),
      experts=[path],
      output=tmp_path / 'out',
      allow_nonfinite=True,
    )
    (tensor,) = checkpoints.report_of(tmp_path / 'out')['tensors']
    assert tensor['merge_norm'] is None


def test_sources_stay_as_they_are(saved, tmp_path):
  base, experts = saved('small')
  copies = checkpoints.save_set(tmp_path, models.SMALL)
  paths = [copies[0], *copies[1], base.parent]
  files = [file for path in paths for file in [path, *path.rglob('*')]]
  modes = {file: file.stat().st_mode for file in files}
  before = [checkpoints.digest(path) for path in paths]
  for file in files:
    file.chmod(modes[file] & ~0o222)
  try:
    for name, rule in {'a': mk.average(), 'b': mk.dare_ties()}.items():
      mk.merge_checkpoints(
        rule, base=copies[0], experts=copies[1], output=tmp_path / name
      )
  finally:
    for file in files:
      file.chmod(modes[file])
  assert [checkpoints.digest(path) for path in paths] == before


def replaced_meanwhile(path, monkeypatch, by):
  """Puts another checkpoint at a path once the first box was merged."""
  merge_unit, left = stream._merge_unit, [1]

  def merge_and_replace(*arguments, **options):
    merge_unit(*arguments, **options)
    if left:
      left.pop()
      path.rename(path.parent / 'old')
      by.rename(path)

  monkeypatch.setattr(stream, '_merge_unit', merge_and_replace)


@pytest.mark.parametrize('layout', ['safetensors', 'arrays apart', 'one file'])
class TestSourceThatChanges:
  """A merge of two states of a model is nobody's model."""

  @pytest.fixture
  def paths(self, layout, tmp_path):
    """A base, an expert, and what is put in its place."""
    shapes = {name: (64, 128) for name in 'abcdef'}
    paths = []
    for name, value in (('base', 0), ('expert', 1), ('next', 9)):
      path = tmp_path / name
      tree = {
        k: np.full(shape, value, 'float32') for k, shape in shapes.items()
      }
      if layout == 'safetensors':
        path.mkdir()
        file = path / 'model.safetensors'
        save_file(tree, file)
        # Else all may be written in one tick of the clock.
        os.utime(file, (value, value))
      else:
        handler = ocp.PyTreeCheckpointHandler(
          use_ocdbt=layout == 'one file', use_compression=False
        )
        with ocp.Checkpointer(handler) as checkpointer:
          checkpointer.save(path, args=ocp.args.PyTreeSave({'params': tree}))
      paths.append(path)
    return paths

  def test_merge(self, paths, tmp_path, monkeypatch):
    base, expert, by = paths
    run = functools.partial(
      mk.merge_checkpoints,
      mk.task_arithmetic(),
      base=base,
      experts=[expert],
      output=tmp_path / 'out',
    )
    with monkeypatch.context() as patch:
      replaced_meanwhile(expert, patch, by)
      # What one file held is not where it was, and may fail to be read.
      with pytest.raises((ValueError, OSError), match='changed|not be read'):
        run()
    names = {path.name for path in tmp_path.iterdir()}
    assert 'out' not in names and 'out.report.json' not in names
    if 'out.mergekit-tmp' in names:
      with pytest.raises(ValueError, match=r'source experts\[0\]'):
        run()
    assert run(resume=False).units_done == 6
    merged = mk.open_checkpoint(tmp_path / 'out')
    for leaf in map(merged.read, merged.specs):
      np.testing.assert_array_equal(leaf, np.full((64, 128), 9.0))

  def test_sweep(self, paths, monkeypatch):
    base, expert, by = paths
    replaced_meanwhile(expert, monkeypatch, by)
    with pytest.raises((ValueError, OSError), match='changed|not be read'):
      mk.sweep({'a': mk.task_arithmetic()}, [expert], base, len)


@contextlib.contextmanager
def jit_off_everywhere():
  """`jax.disable_jit` is about one thread, other than JAX_DISABLE_JIT."""
  jax.config.update('jax_disable_jit', True)
  try:
    yield
  finally:
    jax.config.update('jax_disable_jit', False)


class TestWithoutJit:
  """A stream is compiled, and compiled ahead, whatever that switch says."""

  @pytest.mark.parametrize('off', [jax.disable_jit, jit_off_everywhere])
  def test_same_bits(self, saved, tmp_path, off):
    case = TIES_OF_TENSORS
    with off():
      merge(
        saved('large'),
        tmp_path / 'out',
        case,
        memory_budget=budget_to_cut(case),
        stacked_axes=STACKED,
      )
    check(case, tmp_path / 'out', 'large')

  def test_compiled_as_ever(self, saved, tmp_path):
    """The threads that compile have a switch of their own."""
    seen = []

    @mk.rule
    class First:
      def __call__(self, t):
        if threading.current_thread() is not threading.main_thread():
          seen.append(jax.config.jax_disable_jit)
        return t.experts[0]

    base, experts = saved('small')
    with jit_off_everywhere():
      mk.merge_checkpoints(
        First(), base=base, experts=experts, output=tmp_path / 'out'
      )
    assert seen and not any(seen)


@pytest.mark.parametrize(
  ('count', 'stacked_axes'), [(64, {'w': 0}), (3 * 2**17 + 1, None)]
)
def test_an_element_alone_has_the_bits_that_it_has_among_others(
  count, stacked_axes, tmp_path
):
  """A scale for each layer, and what is left over of slices, are alone."""
  random = np.random.default_rng(0)
  trees = [
    {'w': random.standard_normal(count).astype('float32')} for _ in range(3)
  ]
  paths = []
  for number, tree in enumerate(trees):
    paths.append(tmp_path / f'{number}.safetensors')
    save_file(tree, paths[-1])
  # Of these, a quotient and a product with the reciprocal differ in a third.
  rule = mk.average([0.001, 1.0, 0.5])
  expected = mk.merge(rule, trees, stacked_axes=stacked_axes)
  mk.merge_checkpoints(
    rule, experts=paths, output=tmp_path / 'out', stacked_axes=stacked_axes
  )
  merged = mk.open_checkpoint(tmp_path / 'out').read('w')
  np.testing.assert_array_equal(merged, expected['w'])
