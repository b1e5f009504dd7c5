"""What we write is an ordinary Orbax checkpoint, complete or not there."""

import dataclasses
import inspect
import itertools
import os
import re
import subprocess
import sys
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1
import pytest
import tensorstore as ts

from mergekit_jax.checkpoint import open_checkpoint, orbax_write
from mergekit_jax.checkpoint.orbax_write import write_orbax
from mergekit_jax.checkpoint.source import OrbaxLayout
from mergekit_jax.checkpoint.stage import staged

TABLE = 'params/embed/table'


@pytest.fixture
def specs(mesh, arrays):
  """The tree of `state`, as `write_orbax` takes it."""

  def spec(path, *axes):
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*axes)
    )
    array = arrays[path]
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=sharding)

  return {
    'params': {
      'embed/table': spec(TABLE, 'x', 'y'),
      'layers': [
        spec('params/layers/0', 'x'),
        {'scale': spec('params/layers/1/scale')},
      ],
      'nothing': None,
      'empty': {},
    },
    'step': spec('step'),
  }


@pytest.fixture
def produce(arrays):
  """Writes every array whole, but the table in boxes of 3 x 4."""

  def produce(write):
    for path, array in arrays.items():
      if path != TABLE:
        write(path, None, array)
    # Backwards, as the order should not matter.
    for row in (6, 3, 0):
      for column in (4, 0):
        box = slice(row, min(row + 3, 8)), slice(column, min(column + 4, 6))
        write(TABLE, box, arrays[TABLE][box])

  return produce


def _tiny(value=1.0):
  """A tree of one array, and a `produce` that fills it."""
  specs = {'params': jax.ShapeDtypeStruct((4,), np.float32)}
  block = np.full(4, value, np.float32)
  return specs, lambda write: write('params', (slice(0, 4),), block)


def _check(tree, arrays, mesh=None):
  params = tree['params']
  leaves = {
    TABLE: params['embed/table'],
    'params/layers/0': params['layers'][0],
    'params/layers/1/scale': params['layers'][1]['scale'],
    'step': tree['step'],
  }
  assert params['nothing'] is None
  assert params['empty'] == {}
  for path, leaf in leaves.items():
    # Orbax narrows 64 bits where jax does.
    dtype = jax.dtypes.canonicalize_dtype(arrays[path].dtype)
    assert leaf.dtype == dtype
    np.testing.assert_array_equal(
      np.asarray(leaf), arrays[path].astype(dtype), err_msg=path
    )
  if mesh is not None:
    assert leaves[TABLE].sharding == jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec('x', 'y')
    )


def _target(specs):
  """What to restore: other shardings than were recorded."""
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[3])
  return jax.tree.map(
    lambda s: jax.ShapeDtypeStruct(
      s.shape, jax.dtypes.canonicalize_dtype(s.dtype), sharding=sharding
    ),
    specs,
  )


@pytest.fixture
def base(variant, tmp_path, state):
  """A base checkpoint of every variant, to be written alike."""
  variant.save(tmp_path / 'base', state)
  return open_checkpoint(tmp_path / 'base')


@pytest.fixture
def written(base, tmp_path, specs, produce):
  write_orbax(
    tmp_path / 'out',
    specs,
    base.layout,
    produce,
    chunks={TABLE: (3, 4)},
    metadata={'method': 'ties'},
  )
  return tmp_path / 'out'


def save(path, specs, layout, produce, *, overwrite=False):
  """Writes in a stage, as a merge does."""
  with staged(path, {}, overwrite=overwrite, resume=False) as stage:
    write_orbax(stage.checkpoint, specs, layout, produce)


def test_every_api_restores_every_layout(base, written, arrays, specs, mesh):
  warnings.simplefilter('ignore')
  ours = open_checkpoint(written)
  assert ours.layout == base.layout
  assert ours.specs == base.specs
  assert ours.tree == base.tree
  assert ours.metadata == {'method': 'ties'}
  assert ours.storage(TABLE).chunk == (3, 4)
  assert not ours.storage(TABLE).compressed
  for path, array in arrays.items():
    np.testing.assert_array_equal(np.asarray(ours.read(path)), array)

  step, _, item = base.layout.item.rpartition('/')
  item_directory = written / step / item
  _check(ocp.PyTreeCheckpointer().restore(item_directory), arrays, mesh)
  with ocp.StandardCheckpointer() as checkpointer:
    _check(checkpointer.restore(item_directory), arrays, mesh)
    restored = checkpointer.restore(item_directory, _target(specs))
    _check(restored, arrays)
    table = restored['params']['embed/table']
    assert table.sharding.device_set == {jax.devices()[3]}
  _check(v1.load(written / step), arrays, mesh)
  _check(v1.load(written / step, _target(specs)), arrays)
  if step:
    with ocp.CheckpointManager(written, item_names=(item,)) as manager:
      assert manager.all_steps() == [int(step)]
      args = ocp.args.Composite(**{item: ocp.args.StandardRestore()})
      _check(manager.restore(int(step), args=args)[item], arrays, mesh)
      metadata = manager.metadata(int(step))
      assert metadata.custom_metadata == {'method': 'ties'}
  assert os.listdir(written.parent) in (['base', 'out'], ['out', 'base'])


def test_the_sharding_to_restore_with_is_the_layouts(
  tmp_path, flat, state, arrays, specs, produce
):
  """Word for word, since the base's devices need not be here."""
  flat(tmp_path / 'base', state)
  base = open_checkpoint(tmp_path / 'base')
  assert base.layout is not None
  elsewhere = '{"sharding_type": "SingleDeviceSharding", "device_str": "TPU_7"}'
  of_leaf = {**base.layout.shardings, TABLE: elsewhere}
  bare = jax.tree.map(
    lambda spec: jax.ShapeDtypeStruct(spec.shape, spec.dtype), specs
  )
  layout = dataclasses.replace(base.layout, shardings=of_leaf)
  write_orbax(tmp_path / 'out', bare, layout, produce)
  written = open_checkpoint(tmp_path / 'out').layout.shardings
  assert written.keys() == arrays.keys()
  # What the base has as NumPy arrays or Python numbers gets a device.
  for path in ('step', 'params/layers/1/scale'):
    assert path not in of_leaf
    assert 'SingleDeviceSharding' in written.pop(path)
  assert written == of_leaf


def test_manager_restores_without_being_told_the_items(
  tmp_path, specs, produce, arrays
):
  write_orbax(tmp_path / 'out', specs, OrbaxLayout('5/default'), produce)
  with ocp.CheckpointManager(tmp_path / 'out') as manager:
    args = ocp.args.StandardRestore(_target(specs))
    _check(manager.restore(manager.latest_step(), args=args), arrays)


def test_v1_training_restores(tmp_path, specs, produce, arrays):
  write_orbax(
    tmp_path / 'out', specs, OrbaxLayout('5/state', use_zarr3=True), produce
  )
  with v1.training.Checkpointer(tmp_path / 'out') as checkpointer:
    assert checkpointer.latest.step == 5
    _check(checkpointer.load(5, _target(specs)), arrays)


def test_without_a_layout_the_save_is_flat_ocdbt(tmp_path):
  specs, produce = _tiny()
  write_orbax(tmp_path / 'out', specs, None, produce)
  assert open_checkpoint(tmp_path / 'out').layout == OrbaxLayout()
  restored = ocp.PyTreeCheckpointer().restore(tmp_path / 'out')
  assert restored['params'].tolist() == [1] * 4


def test_strings_are_written(tmp_path):
  specs, produce = _tiny()
  write_orbax(tmp_path / 'out', {**specs, 'name': 'x/y'}, None, produce)
  assert ocp.PyTreeCheckpointer().restore(tmp_path / 'out')['name'] == 'x/y'


def test_a_chunk_is_a_shard_unless_given(tmp_path, specs, produce):
  write_orbax(tmp_path / 'out', specs, None, produce)
  checkpoint = open_checkpoint(tmp_path / 'out')
  assert checkpoint.storage(TABLE).chunk == (2, 3)
  assert checkpoint.storage('params/layers/0').chunk == (1, 6)


@pytest.fixture(scope='module')
def ragged():
  """Arrays whose shape their chunks do not divide, and that compress well."""
  arrays = {
    'kernel': np.arange(100 * 300, dtype=np.float32).reshape(100, 300) // 1000,
    'bias': np.ones(700, jnp.bfloat16),
  }
  chunks = {'kernel': (16, 300), 'bias': (512,)}
  return arrays, chunks


def _codec(path, name, zarr3):
  """How the bytes of an array are encoded on disk, by TensorStore alone."""
  kvstore = {'driver': 'ocdbt', 'base': f'file://{path}/', 'path': f'{name}/'}
  driver = 'zarr3' if zarr3 else 'zarr'
  store = ts.open({'driver': driver, 'kvstore': kvstore}, read=True).result()
  return store.codec.to_json()


def _size(path):
  return sum(f.stat().st_size for f in path.rglob('*') if f.is_file())


@pytest.mark.parametrize('compression', [None, 'zstd'])
@pytest.mark.parametrize('zarr3', [False, True])
def test_zarr3_and_compression(tmp_path, flat, ragged, zarr3, compression):
  """As chosen, whatever the base has, and as Orbax itself would write it."""
  arrays, chunks = ragged
  specs = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}
  boxes = [
    (path, tuple(slice(i, i + n) for i, n in zip(start, chunk, strict=True)))
    for path, chunk in chunks.items()
    for start in itertools.product(
      *map(range, itertools.repeat(0), arrays[path].shape, chunk)
    )
  ]

  def produce(write):
    for path, box in boxes:
      write(path, box, arrays[path][box])

  def written(name, **options):
    like = OrbaxLayout(use_zarr3=not zarr3)
    write_orbax(tmp_path / name, specs, like, produce, chunks=chunks, **options)
    return tmp_path / name

  def inner_chunk(codec):
    return codec['codecs'][0]['configuration'].pop('chunk_shape')

  plain = written('plain')
  out = written('out', zarr3=zarr3, compression=compression)
  assert open_checkpoint(plain).layout == OrbaxLayout(use_zarr3=not zarr3)
  assert open_checkpoint(out).layout == OrbaxLayout(use_zarr3=zarr3)
  assert (_size(out) < _size(plain) / 2) == (compression is not None)

  flat(
    tmp_path / 'orbax',
    {k: jnp.asarray(x) for k, x in arrays.items()},
    use_zarr3=zarr3,
    use_compression=compression is not None,
  )
  for path in arrays:
    ours = _codec(out, path, zarr3)
    theirs = _codec(tmp_path / 'orbax', path, zarr3)
    assert ('zstd' in str(ours)) == (compression is not None)
    if zarr3:  # chunks inside of chunks: one in each
      assert inner_chunk(ours) == list(chunks[path])
      assert inner_chunk(theirs) == list(arrays[path].shape)
    assert ours == theirs

  with ocp.StandardCheckpointer() as checkpointer:
    trees = [checkpointer.restore(out), checkpointer.restore(plain)]
  for tree in [*trees, ocp.PyTreeCheckpointer().restore(out)]:
    for path, array in arrays.items():
      assert np.asarray(tree[path]).tobytes() == array.tobytes()


def test_an_unknown_compression_is_refused(tmp_path):
  specs, produce = _tiny()
  with pytest.raises(ValueError, match="compression='gzip' was given"):
    write_orbax(tmp_path / 'out', specs, None, produce, compression='gzip')
  assert os.listdir(tmp_path) == []


def test_blocks_of_jax_arrays(tmp_path):
  specs = {
    'a': jax.ShapeDtypeStruct((8, 2), jnp.bfloat16),
    'scalar': jax.ShapeDtypeStruct((), jnp.float32),
  }
  array = jnp.arange(16, dtype=jnp.bfloat16).reshape(8, 2)

  def produce(write):
    for row in range(0, 8, 2):
      block = array[row : row + 2]
      future = write('a', (slice(row, row + 2), slice(None)), block)
      future.result()
    write('scalar', (), jnp.float32(3))

  write_orbax(tmp_path / 'out', specs, None, produce)
  checkpoint = open_checkpoint(tmp_path / 'out')
  np.testing.assert_array_equal(np.asarray(checkpoint.read('a')), array)
  assert checkpoint.read('scalar') == 3


def test_a_buffer_may_be_reused_when_its_future_is_done(tmp_path):
  # Chunks of 4 rows: some boxes cover chunks, others only parts of them.
  specs = {'a': jax.ShapeDtypeStruct((64, 8), np.float32)}
  expected = np.random.default_rng(0).normal(size=(64, 8)).astype(np.float32)

  def produce(write):
    buffer = np.empty((8, 8), np.float32)
    for start, stop in [(0, 8), (8, 10), (10, 12), (12, 20), (20, 28)]:
      block = buffer[: stop - start]
      block[...] = expected[start:stop]
      write('a', (slice(start, stop), slice(0, 8)), block).result()
    buffer[...] = -1
    write('a', (slice(28, 64), slice(0, 8)), expected[28:])

  write_orbax(tmp_path / 'out', specs, None, produce, chunks={'a': (4, 8)})
  read = open_checkpoint(tmp_path / 'out').read('a')
  np.testing.assert_array_equal(np.asarray(read), expected)


@pytest.mark.parametrize('item', ['', 'state', '0/items'])
@pytest.mark.parametrize('error', [RuntimeError, KeyboardInterrupt])
def test_an_error_passes_through_and_leaves_nothing(
  tmp_path, specs, arrays, item, error
):
  raised = error('stop')

  def produce(write):
    write(TABLE, None, arrays[TABLE])
    assert not (tmp_path / 'out').exists()
    raise raised

  with pytest.raises(error) as caught:
    save(tmp_path / 'out', specs, OrbaxLayout(item), produce)
  assert caught.value is raised
  assert os.listdir(tmp_path) == []


def test_a_failed_attempt_can_be_repeated(tmp_path):
  specs, produce = _tiny()
  leftover = tmp_path / 'out.mergekit-tmp'
  leftover.mkdir()
  (leftover / 'junk').write_text('')
  save(tmp_path / 'out', specs, None, produce)
  assert os.listdir(tmp_path) == ['out']
  assert not (tmp_path / 'out/junk').exists()


def test_existing_output_is_not_touched(tmp_path, flat):
  flat(tmp_path / 'out', {'params': jnp.zeros(4)})
  specs, produce = _tiny()
  with pytest.raises(FileExistsError, match='overwrite=True'):
    save(tmp_path / 'out', specs, None, produce)
  assert open_checkpoint(tmp_path / 'out').read('params').tolist() == [0] * 4


@pytest.mark.parametrize('item', ['', '0/items'])
def test_overwriting_replaces_only_at_the_end(tmp_path, flat, item):
  flat(tmp_path / 'out', {'params': jnp.zeros(4)})
  specs, tiny = _tiny()

  def stop(write):
    tiny(write)
    raise RuntimeError('stop')

  def produce(write):
    tiny(write)
    old = open_checkpoint(tmp_path / 'out')
    assert old.read('params').tolist() == [0] * 4

  for attempt in (stop, produce):
    old = open_checkpoint(tmp_path / 'out').read('params')
    assert old.tolist() == [0] * 4
    try:
      save(tmp_path / 'out', specs, OrbaxLayout(item), attempt, overwrite=True)
    except RuntimeError:
      assert attempt is stop
    assert os.listdir(tmp_path) == ['out']
  new = open_checkpoint(tmp_path / 'out')
  assert new.layout.item == item
  assert new.read('params').tolist() == [1] * 4


def test_only_a_checkpoint_is_overwritten(tmp_path):
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out/thesis.tex').write_text('')
  specs, produce = _tiny()
  with pytest.raises(FileExistsError, match='is not a checkpoint'):
    save(tmp_path / 'out', specs, None, produce, overwrite=True)
  assert (tmp_path / 'out/thesis.tex').exists()


def test_every_layout_is_overwritten_unless_something_else_is_in_it(
  base, written, specs, produce
):
  levels = [written]
  for name in filter(None, base.layout.item.split('/')):
    levels.append(levels[-1] / name)
  for level in levels:
    other = level / 'thesis.tex'
    other.write_text('years of work')
    found = re.escape(f'(found {other.relative_to(written)})')
    with pytest.raises(FileExistsError, match=found):
      save(written, specs, base.layout, produce, overwrite=True)
    other.unlink()
  save(written, specs, base.layout, produce, overwrite=True)
  assert open_checkpoint(written).layout == base.layout


def test_of_what_is_called_checkpoint_only_a_file_is_overwritten(
  tmp_path, flat
):
  """Old Orbax wrote such a file; a directory is somebody's own."""
  flat(tmp_path / 'out', {'params': jnp.zeros(4)})
  own = tmp_path / 'out/checkpoint/thesis.tex'
  own.parent.mkdir()
  own.write_text('years of work')
  specs, produce = _tiny()
  with pytest.raises(FileExistsError, match=r'nothing else \(found checkpoint'):
    save(tmp_path / 'out', specs, None, produce, overwrite=True)
  own.rename(tmp_path / 'thesis.tex')
  own.parent.rmdir()
  own.parent.write_bytes(b'\x80')
  save(tmp_path / 'out', specs, None, produce, overwrite=True)
  assert not own.parent.exists()


@pytest.mark.parametrize('names', [['llama_7'], ['llama_7', 'other_3']])
def test_a_directory_of_models_is_not_overwritten(tmp_path, flat, names):
  """Although one of them may be read by its path, as the newest step."""
  zoo = tmp_path / 'zoo'
  for name in names:
    flat(zoo / name, {'params': jnp.zeros(4)})
  specs, produce = _tiny()
  with pytest.raises(FileExistsError, match=r'nothing else \(found llama_7\)'):
    save(zoo, specs, None, produce, overwrite=True)
  assert os.listdir(tmp_path) == ['zoo']
  assert sorted(os.listdir(zoo)) == names


def test_a_run_is_not_overwritten(tmp_path):
  """Of several steps a merge reads the newest; it must not cost the others."""
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    for step in (3, 12):
      manager.save(step, args=ocp.args.StandardSave({'params': jnp.zeros(4)}))
  specs, produce = _tiny()
  with pytest.raises(FileExistsError, match=r'nothing else \(found 3\)'):
    save(tmp_path / 'run', specs, None, produce, overwrite=True)
  assert {'3', '12'} <= set(os.listdir(tmp_path / 'run'))
  # A step of it is a checkpoint of its own.
  save(tmp_path / 'run/12', specs, None, produce, overwrite=True)
  assert open_checkpoint(tmp_path / 'run/12').read('params').sum() == 4
  assert {'3', '12'} <= set(os.listdir(tmp_path / 'run'))


def test_parent_directories_are_made(tmp_path):
  specs, produce = _tiny()
  for item in ('', '0/items'):
    path = tmp_path / f'deep{len(item)}/er/out'
    write_orbax(path, specs, OrbaxLayout(item), produce)
    assert open_checkpoint(path).read('params').tolist() == [1] * 4


def test_relative_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  specs, produce = _tiny()
  write_orbax('out', specs, None, produce)
  assert open_checkpoint(tmp_path / 'out').read('params').tolist() == [1] * 4


@pytest.mark.parametrize(
  'path, index, block, message',
  [
    ('parms', None, np.zeros(4, np.float32), "'parms' is not among"),
    ('params', None, np.zeros(4), r'float64\[4\].*needs float32\[4\]'),
    ('params', (slice(2),), np.zeros(4, np.float32), r'needs float32\[2\]'),
    ('params', (slice(0, 4, 2),), np.zeros(2, np.float32), 'step 1'),
  ],
)
def test_a_block_that_does_not_fit_is_an_error(
  tmp_path, path, index, block, message
):
  specs, _ = _tiny()
  with pytest.raises(ValueError, match=message):
    save(tmp_path / 'out', specs, None, lambda write: write(path, index, block))
  assert os.listdir(tmp_path) == []


def test_trees_that_cannot_be_written(tmp_path):
  leaf = jax.ShapeDtypeStruct((4,), np.float32)
  empty = jax.ShapeDtypeStruct((0, 4), np.float32)
  for tree, message in [
    ({'a': None}, 'no jax.ShapeDtypeStruct'),
    ({'a': empty}, 'a is empty'),
    ({'a/b': leaf, 'a': {'b': leaf}}, "'a/b'"),
    ({'a': [leaf], 'a.0': leaf}, "'a/0' and 'a.0' are both called 'a.0'"),
  ]:
    with pytest.raises(ValueError, match=message):
      write_orbax(tmp_path / 'out', tree, None, lambda write: None)
  assert os.listdir(tmp_path) == []


def test_one_device(tmp_path):
  """The other tests run on eight devices."""
  program = f"""
import jax, numpy as np
from mergekit_jax.checkpoint import open_checkpoint
from mergekit_jax.checkpoint.orbax_write import write_orbax
assert len(jax.devices()) == 1
specs = {{'params': jax.ShapeDtypeStruct((4,), np.float32)}}
block = np.ones(4, np.float32)
write_orbax({str(tmp_path / 'out')!r}, specs, None,
            lambda write: write('params', None, block))
assert open_checkpoint({str(tmp_path / 'out')!r}).read('params').sum() == 4
"""
  environment = {**os.environ, 'XLA_FLAGS': ''}
  environment['PYTHONPATH'] = os.pathsep.join(sys.path)
  subprocess.run([sys.executable, '-c', program], env=environment, check=True)


@pytest.mark.parametrize(
  'function, parameters',
  [
    (
      orbax_write.tensorstore_utils.build_array_write_spec,
      'info arg global_shape local_shape dtype use_ocdbt process_index '
      'ext_metadata',
    ),
    (
      orbax_write.jax_array_handlers._async_serialize_shardings,
      'shardings infos primary_host',
    ),
    (
      orbax_write.array_metadata_store.Store.write,
      'checkpoint_dir array_metadatas process_index',
    ),
    (
      orbax_write.tensorstore_utils.get_sharding_tensorstore_spec,
      'directory param_name',
    ),
    (orbax_write.ocdbt_utils.get_process_index_for_subdir, 'use_ocdbt'),
    (ocp.type_handlers.ArrayHandler.serialize, 'values infos args'),
    (ocp.type_handlers.ArrayHandler.__init__, 'array_metadata_store'),
  ],
  ids=lambda value: getattr(value, '__qualname__', None),
)
def test_private_parts_of_orbax_are_as_we_use_them(function, parameters):
  assert set(parameters.split()) <= set(inspect.signature(function).parameters)


def test_private_imports_are_in_one_file_only():
  package = os.path.dirname(os.path.dirname(orbax_write.__file__))
  users = set()
  for directory, _, names in os.walk(package):
    for name in names:
      path = os.path.join(directory, name)
      if name.endswith('.py') and 'checkpoint._src' in open(path).read():
        users.add(name)
  assert users == {'orbax_write.py'}
