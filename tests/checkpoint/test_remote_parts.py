"""What is fetched of remote arrays, and remote files that are damaged."""

import json

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding, PartitionSpec
import numpy as np
import orbax.checkpoint as ocp
import pytest

import mergekit_jax as mk
from mergekit_jax.checkpoint.orbax_write import write_orbax
from tests import checkpoints, s3


@pytest.fixture(scope='module')
def server():
  with s3.serving() as proxy:
    yield proxy


@pytest.fixture(autouse=True)
def store(server, monkeypatch):
  with server.used(monkeypatch):
    yield server


LARGE = {
  # Two chunks of rows. Rows of 4 KiB are fetched with what lies between them,
  # rows of 1 MiB are not.
  'tall': np.arange(256 * 1024, dtype=np.float32).reshape(256, 1024),
  'wide': np.arange(4 * 2**18, dtype=np.float32).reshape(4, 2**18),
}


@pytest.fixture(scope='module')
def large(server, tmp_path_factory):
  """`LARGE` in each format."""
  directory = tmp_path_factory.mktemp('large')
  mesh = jax.make_mesh((2,), ('x',), axis_types=(AxisType.Auto,))
  halves = NamedSharding(mesh, PartitionSpec('x'))
  tree = {k: jax.device_put(v, halves) for k, v in LARGE.items()}
  for name, options in {
    'ocdbt': {},
    'zarr3': {'use_zarr3': True},
    'files': {'use_ocdbt': False},
    'zarr3_files': {'use_ocdbt': False, 'use_zarr3': True},
  }.items():
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, **options)
    ocp.Checkpointer(handler).save(
      directory / name, args=ocp.args.PyTreeSave(tree)
    )
  checkpoints.save_shards(directory / 'safetensors', LARGE)
  server.upload(directory, 'large')
  return 's3://bucket/large'


class TestParts:
  """Of uncompressed arrays no more is fetched than is needed."""

  @pytest.fixture(
    params=['ocdbt', 'zarr3', 'files', 'zarr3_files', 'safetensors']
  )
  def opened(self, request, large, store):
    checkpoint = mk.open_checkpoint(f'{large}/{request.param}')
    assert not any(checkpoint.storage(p).compressed for p in LARGE)
    # Of both chunks, so that what says where they lie has been fetched.
    for path, array in LARGE.items():
      box = slice(0, len(array)), slice(0, 1)
      checkpoint.read(path, index=box)
    store.sent.clear()
    return checkpoint

  def check(self, opened, path, *box):
    read = opened.read(path, index=box)
    np.testing.assert_array_equal(read, LARGE[path][box])
    return np.asarray(read).nbytes

  def test_a_box_of_rows(self, opened, store):
    nbytes = self.check(opened, 'tall', slice(10, 20), slice(0, 1024))
    assert store.bytes_sent == nbytes and len(store.sent) == 1
    store.sent.clear()
    # Of both chunks.
    nbytes = self.check(opened, 'tall', slice(120, 140), slice(0, 1024))
    assert store.bytes_sent == nbytes and len(store.sent) <= 2

  def test_a_box_of_columns(self, opened, store):
    nbytes = self.check(opened, 'wide', slice(0, 4), slice(1000, 3000))
    assert store.bytes_sent == nbytes and len(store.sent) == 4
    store.sent.clear()
    self.check(opened, 'tall', slice(0, 64), slice(1000, 1024))
    assert store.bytes_sent < 64 * 4096 and len(store.sent) == 1

  def test_columns_on_several_devices(self, opened, store):
    mesh = jax.make_mesh((8,), ('x',), axis_types=(AxisType.Auto,))
    columns = NamedSharding(mesh, PartitionSpec(None, 'x'))
    for path, array in LARGE.items():
      store.sent.clear()
      np.testing.assert_array_equal(opened.read(path, columns), array)
      assert store.bytes_sent == array.nbytes
      # A request is for 2 MiB at most.
      assert len(store.sent) <= 4

  def test_opening_reads_no_weights(self, opened, store):
    again = mk.open_checkpoint(opened.path)
    assert again.specs.keys() == LARGE.keys()
    again.fingerprint()
    assert store.bytes_sent < 50_000


@pytest.mark.parametrize('zarr3', [False, True])
def test_chunks_that_do_not_divide_the_array(store, tmp_path, zarr3):
  arrays = {
    'a': np.arange(70).astype(jnp.bfloat16).reshape(10, 7),
    'flags': np.arange(5) % 2 == 0,
    'scalar': np.float64(2.5),
  }
  specs = {k: jax.ShapeDtypeStruct(x.shape, x.dtype) for k, x in arrays.items()}

  def produce(write):
    for path, array in arrays.items():
      write(path, None, np.asarray(array))

  name = f'ragged{zarr3}'
  write_orbax(
    tmp_path / name, specs, None, produce, zarr3=zarr3, chunks={'a': (4, 3)}
  )
  store.upload(tmp_path / name, name)
  opened = mk.open_checkpoint(f's3://bucket/{name}')
  for box in [
    (slice(0, 10), slice(0, 7)),
    (slice(9, 10), slice(6, 7)),
    (slice(3, 9), slice(2, 5)),
    (slice(2, 2), slice(0, 7)),
  ]:
    read = np.asarray(opened.read('a', index=box))
    assert read.tobytes() == arrays['a'][box].tobytes()
  for path in ('flags', 'scalar'):
    np.testing.assert_array_equal(opened.read(path), arrays[path])


def test_a_chunk_that_is_not_there(store, tmp_path):
  """An error, but in checkpoints of the time when zeros were not stored."""
  handler = ocp.PyTreeCheckpointHandler(use_ocdbt=False, use_compression=False)
  ocp.Checkpointer(handler).save(
    tmp_path / 'lacking', args=ocp.args.PyTreeSave({'a': np.ones((4, 3))})
  )
  (tmp_path / 'lacking' / 'a' / '0.0').unlink()
  store.upload(tmp_path / 'lacking', 'lacking')
  with pytest.raises(FileNotFoundError, match='s3://bucket/lacking: a'):
    mk.open_checkpoint('s3://bucket/lacking').read('a')
  header = json.loads((tmp_path / 'lacking' / '_METADATA').read_text())
  del header['store_array_data_equal_to_fill_value']
  store.client.put_object(
    Bucket=s3.BUCKET, Key='lacking/_METADATA', Body=json.dumps(header)
  )
  assert not np.asarray(
    mk.open_checkpoint('s3://bucket/lacking').read('a')
  ).any()


def _write_raw(store, key, header, data):
  header = json.dumps(header).encode()
  length = len(header).to_bytes(8, 'little')
  store.client.put_object(
    Bucket=s3.BUCKET, Key=key, Body=length + header + data
  )


@pytest.mark.parametrize(
  'size, why',
  [
    (7, "before the end of the last tensor, 'w'"),
    (9, "bytes follow the last tensor, 'w'"),
    (8, None),
  ],
)
def test_a_safetensors_object_of_another_size_is_refused(store, size, why):
  entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
  _write_raw(store, 'cut/m.safetensors', {'w': entry}, bytes(size))
  if why is None:
    opened = mk.open_checkpoint('s3://bucket/cut/m.safetensors')
    assert np.asarray(opened.read('w')).tolist() == [0, 0]
    return
  with pytest.raises(ValueError, match=f'm.safetensors is damaged.*{why}'):
    mk.open_checkpoint('s3://bucket/cut/m.safetensors')


@pytest.mark.parametrize(
  'body, why',
  [
    (b'', 'too short to have a header'),
    (b'0' * 99, 'should be 3472328296227680304 bytes long'),
    ((90).to_bytes(8, 'little') + b'{}', 'should be 90 bytes long'),
  ],
)
def test_a_header_is_not_believed(store, body, why):
  store.client.put_object(Bucket=s3.BUCKET, Key='bad/m.safetensors', Body=body)
  with pytest.raises(ValueError, match=f'm.safetensors is damaged.*{why}'):
    mk.open_checkpoint('s3://bucket/bad')
  # No more is asked for than the file can hold.
  assert store.bytes_sent < 10_000


def test_claimed_sizes_that_no_request_can_name(store):
  size = 10**30
  entry = {'dtype': 'U8', 'shape': [size], 'data_offsets': [0, size]}
  _write_raw(store, 'huge/m.safetensors', {'w': entry}, bytes(8))
  with pytest.raises(ValueError, match="the end of the last tensor, 'w'"):
    mk.open_checkpoint('s3://bucket/huge')


def test_an_array_that_was_cut_off_is_an_error(store):
  """Cut off after it was opened."""
  entry = {'dtype': 'F32', 'shape': [2], 'data_offsets': [0, 8]}
  _write_raw(store, 'later/m.safetensors', {'w': entry}, bytes(8))
  opened = mk.open_checkpoint('s3://bucket/later')
  _write_raw(store, 'later/m.safetensors', {'w': entry}, bytes(4))
  with pytest.raises(EOFError, match='later/m.safetensors is cut off'):
    opened.read('w')
