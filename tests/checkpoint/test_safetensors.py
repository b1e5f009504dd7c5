"""Safetensors files read back, whole and in parts, and damaged ones refused."""

import json
import os

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import save_file

from mergekit_jax.checkpoint import open_checkpoint
from tests import checkpoints, compare

QUERY = 'model.layers.0.self_attn.q_proj.weight'
INDEX = 'model.safetensors.index.json'
# What this process has open.
FILES = '/proc/self/fd'


@pytest.fixture
def tensors():
  return {
    QUERY: np.arange(48, dtype=np.float32).reshape(8, 6),
    'model.norm.weight': np.arange(6).astype(jnp.bfloat16),
    'half': np.arange(24, dtype=np.float16).reshape(2, 3, 4),
    'count': np.asarray(2**40 + 1),
    'mask': np.asarray([True, False, True]),
    'nothing': np.zeros((0, 3), np.float32),
  }


@pytest.fixture(params=['file', 'directory', 'shards'])
def saved(request, tmp_path, tensors):
  """The path of `tensors`, saved in one of three ways."""
  metadata = {'format': 'pt'}
  if request.param == 'file':
    save_file(tensors, tmp_path / 'weights.safetensors', metadata)
    return tmp_path / 'weights.safetensors'
  if request.param == 'directory':
    save_file(tensors, tmp_path / 'model.safetensors', metadata)
    return tmp_path
  _save_shards(tmp_path, tensors, metadata)
  return tmp_path


def _save_shards(directory, tensors, metadata=None):
  names = list(tensors)
  places = {}
  for number, part in enumerate((names[:2], names[2:]), 1):
    file_name = f'model-{number:05}-of-00002.safetensors'
    save_file({n: tensors[n] for n in part}, directory / file_name, metadata)
    places |= dict.fromkeys(part, file_name)
  index = {'metadata': {'total_size': 1}, 'weight_map': places}
  (directory / INDEX).write_text(json.dumps(index))


def _write_raw(path, header, data):
  header = json.dumps(header).encode()
  path.write_bytes(len(header).to_bytes(8, 'little') + header + data)


def test_described_by_its_header(saved, tensors):
  checkpoint = open_checkpoint(saved)
  assert checkpoint.format == 'safetensors'
  assert checkpoint.layout is None
  assert os.fspath(checkpoint.path) == os.fspath(saved)
  assert checkpoint.specs == {
    name: jax.ShapeDtypeStruct(tensor.shape, tensor.dtype)
    for name, tensor in tensors.items()
  }
  assert checkpoint.tree == {name: name for name in tensors}
  assert checkpoint.metadata == {'format': 'pt'}
  assert checkpoint.storage(QUERY).chunk == (8, 6)
  assert not checkpoint.storage(QUERY).compressed


def test_read_whole_in_boxes_and_sharded(saved, tensors, mesh):
  checkpoint = open_checkpoint(saved)
  for name, tensor in tensors.items():
    read = checkpoint.read(name)
    assert read.dtype == tensor.dtype
    np.testing.assert_array_equal(np.asarray(read), tensor)

  for spec in [('x', 'y'), ('y',), ()]:
    sharding = jax.sharding.NamedSharding(
      mesh, jax.sharding.PartitionSpec(*spec)
    )
    read = checkpoint.read(QUERY, sharding)
    assert read.sharding == sharding
    np.testing.assert_array_equal(np.asarray(read), tensors[QUERY])
    box = slice(3, 7), slice(1, 5)
    read = checkpoint.read(QUERY, sharding, box)
    assert read.sharding == sharding
    np.testing.assert_array_equal(np.asarray(read), tensors[QUERY][box])

  box = slice(1, 2), slice(0, 2), slice(-3, None)
  out = np.full((1, 2, 3), -1, np.float16)
  future = checkpoint.read_into('half', box, out)
  future.result()
  np.testing.assert_array_equal(out, tensors['half'][box])


def test_relative_path(saved, tensors, tmp_path, monkeypatch):
  """It is where it was when it was opened."""
  monkeypatch.chdir(tmp_path)
  checkpoint = open_checkpoint(os.path.relpath(saved))
  fingerprint = checkpoint.fingerprint()
  monkeypatch.chdir('/')
  np.testing.assert_array_equal(checkpoint.read(QUERY), tensors[QUERY])
  assert checkpoint.fingerprint() == fingerprint


@pytest.mark.parametrize(
  'name, dtype',
  [
    ('F8_E4M3', jnp.float8_e4m3fn),
    ('F8_E5M2', jnp.float8_e5m2),
    ('F8_E8M0', jnp.float8_e8m0fnu),
  ],
)
def test_float8(tmp_path, name, dtype):
  tensor = np.asarray([[1, 2], [4, 8]]).astype(dtype)
  header = {'w': {'dtype': name, 'shape': [2, 2], 'data_offsets': [0, 4]}}
  _write_raw(tmp_path / 'w.safetensors', header, tensor.tobytes())
  read = open_checkpoint(tmp_path).read('w', index=(slice(1, 2), slice(None)))
  assert read.dtype == dtype
  assert np.asarray(read).astype(int).tolist() == [[4, 8]]


def test_unknown_path_names_the_nearest(saved):
  with pytest.raises(ValueError, match=QUERY):
    open_checkpoint(saved).read('model.layers.0.self_attn.q_proj')


def test_buffer_that_does_not_fit_is_an_error(saved):
  with pytest.raises(ValueError, match=r'float64\[8, 6\]'):
    open_checkpoint(saved).read_into(QUERY, None, np.empty((8, 6)))


def test_dtype_that_numpy_lacks(tmp_path):
  header = {'w': {'dtype': 'F4', 'shape': [2], 'data_offsets': [0, 1]}}
  _write_raw(tmp_path / 'w.safetensors', header, b'\0')
  with pytest.raises(ValueError, match="'w' is stored as F4"):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize('keep', [0, 4, 8, 20, -1])
def test_cut_off_file(tmp_path, tensors, keep):
  file = tmp_path / 'model.safetensors'
  save_file(tensors, file)
  file.write_bytes(file.read_bytes()[:keep])
  with pytest.raises(ValueError, match='model.safetensors is damaged'):
    open_checkpoint(tmp_path)


def test_cut_off_file_names_the_tensor(tmp_path):
  save_file({'a': np.ones(4), 'b': np.ones(4)}, tmp_path / 'm.safetensors')
  os.truncate(
    tmp_path / 'm.safetensors', (tmp_path / 'm.safetensors').stat().st_size - 1
  )
  with pytest.raises(ValueError, match=r"m.safetensors .*'b'"):
    open_checkpoint(tmp_path)


def test_header_that_is_no_json(tmp_path):
  (tmp_path / 'm.safetensors').write_bytes((4).to_bytes(8, 'little') + b'{"a}')
  with pytest.raises(ValueError, match='m.safetensors is damaged'):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize('length', [2**63, 2**64 - 1, 10**8 + 1, 18])
def test_header_that_claims_to_be_longer_than_the_file(tmp_path, length):
  """Its length is not believed: it would be allocated before it is read."""
  file = tmp_path / 'm.safetensors'
  file.write_bytes(length.to_bytes(8, 'little') + b'{"a":{}}' + bytes(9))
  if length == 10**8 + 1:
    os.truncate(file, 2 * 10**8)
  with pytest.raises(ValueError, match=f'should be {length} bytes long'):
    open_checkpoint(tmp_path)


def _entry(*offsets, shape=(4,), dtype='U8'):
  return {'dtype': dtype, 'shape': shape, 'data_offsets': offsets}


@pytest.mark.parametrize(
  'header, why',
  [
    ({'a': _entry(0, 4), 'b': _entry(2, 6)}, "'b'.* bytes 2 to 6, "),
    ({'a': _entry(0, 4), 'b': _entry(0, 4)}, "'b'.* the ones before it end at"),
    ({'a': _entry(0, 4), 'b': _entry(5, 9)}, "'b'.* bytes 5 to 9, "),
    ({'a': _entry(4, 8)}, "'a'.* bytes 4 to 8, "),
    ({'a': _entry(0, 4)}, "bytes follow the last tensor, 'a'"),
    (
      {'a': _entry(0, 4), 'b': _entry(4, 12, shape=[8])},
      "ends before the end of the last tensor, 'b'",
    ),
    ({'a': _entry(0, 8)}, r"'a' \(uint8\[4\], 4 bytes\).*0 to 8"),
    ({'a': _entry(8, 4)}, "'a'.*8 to 4"),
    ({'a': _entry(-4, 4, shape=[8])}, 'whole numbers of 0 or more'),
    ({'a': _entry(0, 8, shape=[-2, -4])}, 'whole numbers of 0 or more'),
    ({'a': _entry(0.0, 8)}, 'whole numbers of 0 or more'),
    ({'a': _entry(0, True, shape=[1])}, 'whole numbers of 0 or more'),
    ({'a': _entry(0)}, 'malformed'),
    ({'a': {'dtype': 'U8', 'shape': [8]}}, "malformed.*'data_offsets'"),
    ({'a': [0, 8]}, 'malformed'),
    ({'a': _entry(0, 8, shape=8)}, 'malformed'),
    ([1, 2], 'malformed.*not an object'),
    ({'__metadata__': {'a': 1}}, 'malformed.*not text'),
    ({'__metadata__': 3}, 'malformed'),
  ],
)
def test_header_that_does_not_describe_the_file(tmp_path, header, why):
  _write_raw(tmp_path / 'm.safetensors', header, bytes(8))
  with pytest.raises(ValueError, match=f'm.safetensors is damaged.*{why}'):
    open_checkpoint(tmp_path)


def test_name_that_is_given_twice(tmp_path):
  entry = json.dumps(_entry(0, 4))
  header = f'{{"a":{entry},"a":{entry}}}'.encode()
  (tmp_path / 'm.safetensors').write_bytes(
    len(header).to_bytes(8, 'little') + header + bytes(4)
  )
  with pytest.raises(ValueError, match="m.safetensors .*'a' is there twice"):
    open_checkpoint(tmp_path)


def test_index_that_places_a_tensor_twice(tmp_path, tensors):
  _save_shards(tmp_path, tensors)
  index = '{"weight_map": {"a": "x.safetensors", "a": "y.safetensors"}}'
  (tmp_path / INDEX).write_text(index)
  with pytest.raises(ValueError, match=f"{INDEX} .*'a' is there twice"):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
  'place',
  [
    '../secret.safetensors',
    '/etc/secret.safetensors',
    'sub/model.safetensors',
    '..\\secret.safetensors',
    'config.json',
    '..',
    'a\0.safetensors',
    7,
    None,
  ],
)
def test_index_that_leads_elsewhere(tmp_path, tensors, place):
  model = tmp_path / 'model'
  (model / 'sub').mkdir(parents=True)
  for directory in (tmp_path, model / 'sub'):
    save_file(tensors, directory / 'secret.safetensors')
    save_file(tensors, directory / 'model.safetensors')
  index = {'weight_map': {QUERY: place}}
  (model / INDEX).write_text(json.dumps(index))
  with pytest.raises(ValueError, match='a shard is a .* beside the index'):
    open_checkpoint(model)


def test_symlinks(tmp_path, tensors):
  """The Hugging Face cache keeps blobs elsewhere and links to them."""
  _save_shards(tmp_path, tensors)
  snapshot = tmp_path / 'snapshots' / 'main'
  (tmp_path / 'blobs').mkdir()
  snapshot.mkdir(parents=True)
  for number, file in enumerate(sorted(tmp_path.glob('model*'))):
    file.rename(tmp_path / 'blobs' / str(number))
    (snapshot / file.name).symlink_to(f'../../blobs/{number}')
  checkpoint = open_checkpoint(snapshot)
  assert set(checkpoint.specs) == set(tensors)
  np.testing.assert_array_equal(
    np.asarray(checkpoint.read(QUERY)), tensors[QUERY]
  )
  shard = next(snapshot.glob('*1-of-*.safetensors'))
  assert QUERY in open_checkpoint(shard).specs


def test_missing_shard(tmp_path, tensors):
  _save_shards(tmp_path, tensors)
  (tmp_path / 'model-00002-of-00002.safetensors').unlink()
  with pytest.raises(ValueError, match=r"00002-of-00002.* missing.*'count'"):
    open_checkpoint(tmp_path)


def test_tensor_that_its_shard_lacks(tmp_path, tensors):
  _save_shards(tmp_path, tensors)
  save_file(
    {'half': tensors['half']}, tmp_path / 'model-00002-of-00002.safetensors'
  )
  with pytest.raises(ValueError, match=r"00002-of-00002.*lacks.*'count'"):
    open_checkpoint(tmp_path)


def test_index_of_another_name(tmp_path, tensors):
  """As diffusers call it; with several, the usual name is taken."""
  other = 'diffusion_pytorch_model.safetensors.index.json'
  _save_shards(tmp_path, tensors)
  (tmp_path / INDEX).rename(tmp_path / other)
  assert set(open_checkpoint(tmp_path).specs) == set(tensors)
  (tmp_path / 'ema.safetensors.index.json').write_text('{}')
  with pytest.raises(ValueError, match=f"'{other}', 'ema.*which one is meant"):
    open_checkpoint(tmp_path)
  _save_shards(tmp_path, tensors)
  assert set(open_checkpoint(tmp_path).specs) == set(tensors)


def test_index_that_is_not_there(tmp_path, tensors):
  """A cache links to what it may not have loaded yet."""
  save_file(tensors, tmp_path / 'model.safetensors')
  (tmp_path / INDEX).symlink_to('nowhere')
  assert set(open_checkpoint(tmp_path).specs) == set(tensors)


@pytest.mark.parametrize('other', ['another', 'model-00001-of-00002', ''])
def test_names_that_lead_to_no_file(tmp_path, tensors, other):
  """They are no second model, and where they are alone there is none."""
  (tmp_path / f'{other}.safetensors').mkdir()
  (tmp_path / f'{other}{INDEX}').mkdir()
  (tmp_path / 'link.safetensors').symlink_to('nowhere')
  with pytest.raises(ValueError, match='is not a checkpoint'):
    open_checkpoint(tmp_path)
  save_file(tensors, tmp_path / 'model.safetensors')
  assert set(open_checkpoint(tmp_path).specs) == set(tensors)


def test_one_shard_of_several_is_no_model(tmp_path, tensors):
  """Half a download, or a cache of which a part was removed."""
  file = tmp_path / 'model-00001-of-00002.safetensors'
  save_file(tensors, file)
  for link in (None, 'model-00002-of-00002.safetensors'):
    if link:
      (tmp_path / link).symlink_to('nowhere')
    with pytest.raises(ValueError, match='alone, one of 2 files'):
      open_checkpoint(tmp_path)
  assert set(open_checkpoint(file).specs) == set(tensors)
  file.rename(tmp_path / 'model-00001-of-00001.safetensors')
  assert set(open_checkpoint(tmp_path).specs) == set(tensors)


def test_a_directory_called_as_a_model_beside_shards(tmp_path, tensors):
  _save_shards(tmp_path, tensors)
  (tmp_path / 'model.safetensors').mkdir()
  assert set(open_checkpoint(tmp_path).specs) == set(tensors)


@pytest.mark.skipif(
  not os.path.exists(FILES),
  reason='only Linux lists the files that a process has open in /proc',
)
def test_no_file_stays_open(tmp_path):
  """A process may have 1024; nine models of 120 shards are more."""
  tensors = {f'{i}': np.full(3, i, np.float32) for i in range(60)}
  checkpoints.save_shards(tmp_path / 'c', tensors)
  before = len(os.listdir(FILES))
  checkpoint = open_checkpoint(tmp_path / 'c')
  reads = {name: np.asarray(checkpoint.read(name)) for name in tensors}
  assert len(os.listdir(FILES)) < before + 10
  compare.same_bits(reads, tensors)


@pytest.mark.parametrize('text', ['{', '{}'])
def test_damaged_index(tmp_path, text):
  (tmp_path / INDEX).write_text(text)
  with pytest.raises(ValueError, match=f'{INDEX} is damaged'):
    open_checkpoint(tmp_path)


def test_several_files_without_an_index(tmp_path, tensors):
  _save_shards(tmp_path, tensors)
  (tmp_path / INDEX).unlink()
  with pytest.raises(ValueError, match='no model.safetensors.index.json'):
    open_checkpoint(tmp_path)


@pytest.mark.parametrize(
  'other', ['consolidated', 'adapter_model', 'model-00001-of-00002']
)
def test_a_whole_model_beside_other_files(tmp_path, tensors, other):
  """transformers takes model.safetensors; a shard may be of that, or not."""
  save_file(tensors, tmp_path / 'model.safetensors')
  save_file({'a': np.ones(4)}, tmp_path / f'{other}.safetensors')
  if '-of-' in other:
    with pytest.raises(ValueError, match='Give the path of one file'):
      open_checkpoint(tmp_path)
    return
  assert set(open_checkpoint(tmp_path).specs) == set(tensors)
  os.truncate(tmp_path / 'model.safetensors', 99)
  with pytest.raises(ValueError, match='model.safetensors is damaged'):
    open_checkpoint(tmp_path)


def test_fingerprint_sees_changes_and_reads_no_weights(tmp_path):
  file = tmp_path / 'm.safetensors'
  save_file({'a': np.ones(4)}, file)
  fingerprint = open_checkpoint(tmp_path).fingerprint()
  assert open_checkpoint(file).fingerprint() == fingerprint

  status = file.stat()
  file.write_bytes(file.read_bytes()[:-8] + bytes(8))
  os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert open_checkpoint(tmp_path).fingerprint() == fingerprint
  os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
  assert open_checkpoint(tmp_path).fingerprint() != fingerprint

  save_file({'b': np.ones(4)}, file)
  os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
  assert open_checkpoint(tmp_path).fingerprint() != fingerprint
