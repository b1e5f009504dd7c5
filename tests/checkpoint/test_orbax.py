"""Checkpoints written by ordinary Orbax read back, whole and in parts."""

import errno
import json
import os
import shutil

from etils import epath
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint.experimental import v1
import pytest

from mergekit_jax.checkpoint import open_checkpoint

TABLE = 'params/embed/table'


def _files(directory):
  return {
    path.relative_to(directory): path.stat().st_mtime_ns
    for path in directory.rglob('*')
  }


def _save_items(path, **items):
  with ocp.CheckpointManager(path, item_names=tuple(items)) as manager:
    args = {name: ocp.args.PyTreeSave(tree) for name, tree in items.items()}
    manager.save(0, args=ocp.args.Composite(**args))


def test_every_variant_is_described(variant, tmp_path, state, arrays):
  variant.save(tmp_path / 'c', state)
  checkpoint = open_checkpoint(tmp_path / 'c')
  assert checkpoint.format == 'orbax'
  assert checkpoint.layout == variant.layout
  assert os.fspath(checkpoint.path) == os.fspath(tmp_path / 'c')
  assert checkpoint.specs == {
    path: jax.ShapeDtypeStruct(array.shape, array.dtype)
    for path, array in arrays.items()
  }
  assert checkpoint.tree == {
    'params': {
      'embed/table': TABLE,
      'layers': ['params/layers/0', {'scale': 'params/layers/1/scale'}],
      'nothing': None,
      'empty': {},
    },
    'step': 'step',
  }
  storage = checkpoint.storage(TABLE)
  assert storage.chunk == (2, 3)
  assert storage.compressed == variant.compressed
  assert checkpoint.storage('step').chunk == ()


def test_every_variant_reads_whole_in_boxes_and_sharded(
  variant, tmp_path, state, arrays, mesh
):
  variant.save(tmp_path / 'c', state)
  checkpoint = open_checkpoint(tmp_path / 'c')
  before = _files(tmp_path)
  for path, array in arrays.items():
    read = checkpoint.read(path)
    assert read.dtype == array.dtype
    np.testing.assert_array_equal(np.asarray(read), array)

  for spec in [('x', 'y'), ('y', None), (None, 'x'), ()]:
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*spec)
    )
    if spec != (None, 'x'):
      read = checkpoint.read(TABLE, sharding)
      assert read.sharding == sharding
      np.testing.assert_array_equal(np.asarray(read), arrays[TABLE])
    box = slice(3, 7), slice(1, 5)
    read = checkpoint.read(TABLE, sharding, box)
    assert read.sharding == sharding
    np.testing.assert_array_equal(np.asarray(read), arrays[TABLE][box])

  out = np.full((3, 2), -1, jnp.bfloat16)
  box = slice(1, 4), slice(-2, None)
  future = checkpoint.read_into('params/layers/0', box, out)
  future.result()
  np.testing.assert_array_equal(out, arrays['params/layers/0'][box])
  assert _files(tmp_path) == before


def test_scalars_of_64_bits_stay_exact(tmp_path, flat):
  flat(tmp_path / 'c', {'params': {'a': jnp.ones(1)}, 'step': 2**40, 'lr': 0.1})
  checkpoint = open_checkpoint(tmp_path / 'c')
  assert int(checkpoint.read('step')) == 2**40
  assert float(checkpoint.read('lr')) == 0.1
  out = np.empty((), np.int64)
  checkpoint.read_into('step', (), out).result()
  assert out == 2**40


def test_strings_are_kept_in_the_tree(tmp_path, flat):
  # This string could be taken for the path of an array.
  flat(tmp_path / 'c', {'params': {'a': jnp.ones(1)}, 'name': 'params/a'})
  checkpoint = open_checkpoint(tmp_path / 'c')
  assert checkpoint.tree == {'params': {'a': 'params/a'}, 'name': 'params/a'}
  assert list(checkpoint.specs) == ['params/a']


def test_same_path_twice_is_an_error(tmp_path, flat):
  flat(tmp_path / 'c', {'a/b': jnp.ones(1), 'a': {'b': jnp.ones(1)}})
  with pytest.raises(ValueError, match="'a/b'"):
    open_checkpoint(tmp_path / 'c')


def test_unknown_path_names_the_nearest(tmp_path, flat, state):
  flat(tmp_path / 'c', state)
  checkpoint = open_checkpoint(tmp_path / 'c')
  for read in (checkpoint.read, checkpoint.storage):
    with pytest.raises(ValueError, match='params/embed/table'):
      read('params/embed_table')


@pytest.mark.parametrize(
  'out',
  [
    np.empty((8, 6), np.float64),
    np.empty((8, 5), np.float32),
    np.empty((6, 8), np.float32).T,
    np.frombuffer(bytes(8 * 6 * 4), np.float32).reshape(8, 6),
  ],
  ids=['dtype', 'shape', 'order', 'readonly'],
)
def test_buffer_that_does_not_fit_is_an_error(tmp_path, flat, state, out):
  flat(tmp_path / 'c', state)
  with pytest.raises(ValueError, match='C-contiguous'):
    open_checkpoint(tmp_path / 'c').read_into(TABLE, None, out)


@pytest.mark.parametrize('index', [(slice(0, 1),), (slice(0, 8, 2), slice(6))])
def test_index_that_does_not_fit_is_an_error(tmp_path, flat, state, index):
  flat(tmp_path / 'c', state)
  with pytest.raises(ValueError, match='one slice of step 1'):
    open_checkpoint(tmp_path / 'c').read(TABLE, index=index)


def test_empty_box(tmp_path, flat, state):
  flat(tmp_path / 'c', state)
  box = slice(3, 3), slice(0, 6)
  assert open_checkpoint(tmp_path / 'c').read(TABLE, index=box).shape == (0, 6)


def test_custom_metadata(tmp_path):
  checkpointer = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())
  args = ocp.args.PyTreeSave({'a': jnp.ones(1)}, custom_metadata={'item': 1})
  checkpointer.save(tmp_path / 'c', args=args, custom_metadata={'top': 2})
  assert open_checkpoint(tmp_path / 'c').metadata == {'item': 1, 'top': 2}


def test_custom_metadata_of_a_step(tmp_path):
  with ocp.CheckpointManager(tmp_path / 'c') as manager:
    manager.save(
      1,
      args=ocp.args.StandardSave({'a': jnp.ones(1)}),
      custom_metadata={'scan_layers': True},
    )
  for path in ('c', 'c/1', 'c/1/default'):
    checkpoint = open_checkpoint(tmp_path / path)
    assert checkpoint.metadata == {'scan_layers': True}


@pytest.mark.parametrize('path', ['c', 'c/12', 'c/12/default'])
def test_layout_is_the_same_whatever_is_pasted(path, tmp_path, state):
  with ocp.CheckpointManager(tmp_path / 'c') as manager:
    manager.save(12, args=ocp.args.StandardSave(state))
  assert open_checkpoint(tmp_path / path).layout.item == '12/default'
  # Older versions of Orbax did not write this file.
  (tmp_path / 'c/12/_CHECKPOINT_METADATA').unlink()
  assert open_checkpoint(tmp_path / path).layout.item == '12/default'


def test_a_save_whose_name_ends_in_a_number_is_no_step(tmp_path, state):
  v1.save(tmp_path / 'expert_1', state)
  assert open_checkpoint(tmp_path / 'expert_1').layout.item == 'state'
  assert open_checkpoint(tmp_path / 'expert_1/state').layout.item == 'state'


def test_newest_complete_step_is_taken(tmp_path):
  with ocp.CheckpointManager(
    tmp_path / 'c', options=ocp.CheckpointManagerOptions(step_prefix='at')
  ) as manager:
    for step in (9, 10):
      manager.save(
        step, args=ocp.args.StandardSave({'params': jnp.full(2, step)})
      )
  shutil.copytree(
    tmp_path / 'c/at_10', tmp_path / 'c/at_11.orbax-checkpoint-tmp'
  )
  (tmp_path / 'c/at_12').mkdir()
  checkpoint = open_checkpoint(tmp_path / 'c')
  assert checkpoint.layout.item == 'at_10/default'
  assert checkpoint.read('params').tolist() == [10, 10]


def test_flat_saves_named_by_step(tmp_path, flat):
  for step in (9, 10):
    flat(tmp_path / f'c/{step}', {'params': jnp.full(2, step)})
  checkpoint = open_checkpoint(tmp_path / 'c')
  assert checkpoint.layout.item == ''
  assert checkpoint.read('params').tolist() == [10, 10]


def test_item_with_the_parameters_is_taken(tmp_path):
  ones = {'w': jnp.ones(1)}
  _save_items(tmp_path / 'one', state={'params': ones}, aux=ones)
  assert open_checkpoint(tmp_path / 'one').layout.item == '0/state'
  _save_items(tmp_path / 'bare', state={'params': ones}, rng=ones['w'])
  assert open_checkpoint(tmp_path / 'bare').layout.item == '0/state'
  _save_items(tmp_path / 'name', params=ones, optimizer=ones)
  assert open_checkpoint(tmp_path / 'name').layout.item == '0/params'
  _save_items(tmp_path / 'two', ema={'params': ones}, items={'params': ones})
  assert open_checkpoint(tmp_path / 'two').layout.item == '0/items'


@pytest.mark.parametrize('key', ['w', 'params'])
def test_item_in_doubt_must_be_named(tmp_path, key):
  tree = {key: jnp.ones(1)}
  _save_items(tmp_path / 'c', ema=tree, raw=tree)
  with pytest.raises(ValueError, match=r"'ema', 'raw'.*<path>/<step>/<item>"):
    open_checkpoint(tmp_path / 'c')
  assert open_checkpoint(tmp_path / 'c/0/raw').layout.item == '0/raw'


def test_opening_reads_no_weights(tmp_path, flat, state):
  flat(tmp_path / 'c', state, use_ocdbt=False)
  shutil.rmtree(tmp_path / 'c/params.embed')
  flat(tmp_path / 'd', state, use_ocdbt=False)
  table = tmp_path / 'd/params.embed/table'
  (table / '0.0').unlink()
  checkpoint = open_checkpoint(tmp_path / 'd')
  assert checkpoint.specs[TABLE].shape == (8, 6)
  # What is missing is an error, never zeros.
  with pytest.raises(ValueError, match='missing'):
    checkpoint.read(TABLE)
  with pytest.raises(ValueError, match='damaged'):
    open_checkpoint(tmp_path / 'c')


def test_zeros_that_an_older_orbax_did_not_store(tmp_path, flat, state, arrays):
  flat(tmp_path / 'c', state, use_ocdbt=False)
  file = tmp_path / 'c/_METADATA'
  header = json.loads(file.read_text())
  del header['store_array_data_equal_to_fill_value']
  file.write_text(json.dumps(header))
  (tmp_path / 'c/params.embed/table/0.0').unlink()
  expected = arrays[TABLE].copy()
  expected[:2, :3] = 0
  read = open_checkpoint(tmp_path / 'c').read(TABLE)
  np.testing.assert_array_equal(np.asarray(read), expected)


def test_damaged_metadata_names_the_file(tmp_path, flat, state):
  flat(tmp_path / 'c', state)
  file = tmp_path / 'c/_METADATA'
  file.write_text(file.read_text()[:-20])
  with pytest.raises(ValueError, match='_METADATA is damaged'):
    open_checkpoint(tmp_path / 'c')


@pytest.mark.parametrize(
  'error',
  [
    PermissionError(errno.EACCES, 'Permission denied'),
    ValueError('PERMISSION_DENIED: Error opening "zarr" driver'),  # TensorStore
  ],
)
def test_what_may_not_be_read_is_not_damaged(
  tmp_path, flat, state, monkeypatch, error
):
  flat(tmp_path / 'c', state)

  def denied(*_):
    raise error

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, 'metadata', denied)
  with pytest.raises(PermissionError, match='c cannot be read, for want of'):
    open_checkpoint(tmp_path / 'c')


@pytest.mark.parametrize(
  ('compressed', 'error'), [(True, ValueError), (False, EOFError)]
)
def test_cut_off_data_is_an_error(tmp_path, flat, compressed, error):
  array = np.random.default_rng(0).integers(0, 255, 4096, np.uint8)
  flat(tmp_path / 'c', {'a': array}, use_compression=compressed)
  checkpoint = open_checkpoint(tmp_path / 'c')
  for file in (tmp_path / 'c').rglob('d/*'):
    if file.stat().st_size > 1000:
      os.truncate(file, 1000)
  with pytest.raises(error, match='a'):
    checkpoint.read('a')


def test_unfinished_save_is_an_error(tmp_path, flat, state):
  flat(tmp_path / 'c', state)
  unfinished = tmp_path / 'c.orbax-checkpoint-tmp'
  (tmp_path / 'c').rename(unfinished)
  with pytest.raises(ValueError, match='not finished'):
    open_checkpoint(unfinished)


def test_replaced_checkpoint_is_read_anew(tmp_path, flat):
  flat(tmp_path / 'c', {'a': jnp.zeros(4)})
  old = open_checkpoint(tmp_path / 'c')
  old.read('a')
  shutil.rmtree(tmp_path / 'c')
  flat(tmp_path / 'c', {'a': jnp.ones(4)})
  assert open_checkpoint(tmp_path / 'c').read('a').tolist() == [1] * 4


def test_relative_path(tmp_path, flat, monkeypatch):
  flat(tmp_path / 'c', {'a': jnp.ones(4)})
  monkeypatch.chdir(tmp_path)
  checkpoint = open_checkpoint('c')
  assert os.fspath(checkpoint.path) == 'c'
  monkeypatch.chdir('/')
  assert checkpoint.read('a').tolist() == [1] * 4


def test_fingerprint_sees_changes_and_reads_no_weights(tmp_path, flat, state):
  flat(tmp_path / 'c', state, use_ocdbt=False)
  fingerprint = open_checkpoint(tmp_path / 'c').fingerprint()
  shutil.copytree(tmp_path / 'c', tmp_path / 'copy')
  assert open_checkpoint(tmp_path / 'copy').fingerprint() == fingerprint

  chunk = tmp_path / 'copy/params.embed/table/0.0'
  status = chunk.stat()
  chunk.write_bytes(bytes(status.st_size))
  os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert open_checkpoint(tmp_path / 'copy').fingerprint() == fingerprint
  os.utime(chunk, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  assert open_checkpoint(tmp_path / 'copy').fingerprint() != fingerprint

  file = tmp_path / 'c/_METADATA'
  file.write_text(file.read_text() + ' ')
  assert open_checkpoint(tmp_path / 'c').fingerprint() != fingerprint


def test_nothing_there(tmp_path):
  with pytest.raises(FileNotFoundError, match='nowhere'):
    open_checkpoint(tmp_path / 'nowhere')


def test_not_a_checkpoint_lists_what_is_there(tmp_path, flat):
  (tmp_path / 'readme.txt').write_text('hello')
  with pytest.raises(ValueError, match='_METADATA.*safetensors.*readme.txt'):
    open_checkpoint(tmp_path)
  with pytest.raises(ValueError, match='not a checkpoint'):
    open_checkpoint(tmp_path / 'readme.txt')
  # One of several saves is not picked for the user.
  flat(tmp_path / 'saves/base', {'params': jnp.ones(1)})
  with pytest.raises(ValueError, match='not a checkpoint.*base'):
    open_checkpoint(tmp_path / 'saves')


def test_pickled_weights_are_refused(tmp_path):
  file = tmp_path / 'pytorch_model.bin'
  file.write_bytes(b'')
  for path in (tmp_path, file):
    with pytest.raises(ValueError, match='PyTorch.*safetensors'):
      open_checkpoint(path)


@pytest.mark.parametrize('given', ['', '12', '12/default'])
def test_location_is_what_is_read(tmp_path, given):
  with ocp.CheckpointManager(tmp_path / 'run') as manager:
    for step in (3, 12):
      manager.save(step, args=ocp.args.StandardSave({'w': jnp.ones(1)}))
  location = open_checkpoint(tmp_path / 'run' / given).location
  assert location == epath.Path(tmp_path / 'run/12/default')
  assert location.is_dir()


def test_a_disk_that_fails_is_not_taken_for_damage(tmp_path, monkeypatch):
  """Nobody need restore a checkpoint that can be read another time."""
  with ocp.StandardCheckpointer() as checkpointer:
    checkpointer.save(tmp_path / 'one', {'a': jnp.ones(3)})

  def failing(*arguments):
    raise OSError(errno.EIO, os.strerror(errno.EIO))

  monkeypatch.setattr(ocp.PyTreeCheckpointHandler, 'metadata', failing)
  with pytest.raises(OSError, match=os.strerror(errno.EIO)):
    open_checkpoint(tmp_path / 'one')
