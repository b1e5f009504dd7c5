"""Sources in an object store, against an S3-compatible server."""

import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.checkpoint import remote
from tests import checkpoints, s3

_NAMES = ('base', 'expert0', 'expert1')


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """A directory with a base and two experts in each of its directories."""
  directory = tmp_path_factory.mktemp('local')
  shapes = {'a': (64, 48), 'b': (40,)}
  checkpoints.save_set(directory / 'plain', shapes, experts=2)
  checkpoints.save_set(directory / 'zipped', shapes, experts=2, compress=True)
  for name in _NAMES:
    arrays = checkpoints.load_floats(directory / 'plain' / name)
    checkpoints.save_shards(directory / 'shards' / name, arrays)
  return directory


@pytest.fixture(scope='module')
def server(local):
  """A server that holds what `local` holds, behind a proxy."""
  with s3.serving() as proxy:
    proxy.upload(local, 'run')
    yield proxy


@pytest.fixture(autouse=True)
def store(server, monkeypatch):
  with server.used(monkeypatch):
    yield server


def _merge(directory, output):
  base, *experts = (f'{directory}/{name}' for name in _NAMES)
  return mk.merge_checkpoints(
    mk.task_arithmetic(scale=0.7), base=base, experts=experts, output=output
  )


@pytest.mark.parametrize('kind', ['plain', 'zipped', 'shards'])
def test_opens_like_a_local_checkpoint(local, kind):
  here = mk.open_checkpoint(local / kind / 'base')
  there = mk.open_checkpoint(f's3://bucket/run/{kind}/base')
  assert there.specs == here.specs
  assert there.tree == here.tree
  assert there.layout == here.layout
  assert there.metadata == here.metadata
  again = mk.open_checkpoint(f's3://bucket/run/{kind}/base')
  assert again.fingerprint() == there.fingerprint()
  for path, spec in here.specs.items():
    box = tuple(slice(size // 3, size) for size in spec.shape)
    np.testing.assert_array_equal(
      there.read(path, index=box), here.read(path, index=box)
    )
    np.testing.assert_array_equal(there.read(path), here.read(path))


@pytest.mark.parametrize('kind', ['plain', 'zipped', 'shards'])
def test_merge_equals_the_local_one(local, kind, store, tmp_path):
  _merge(local / kind, tmp_path / 'local')
  assert not store.sent
  _merge(f's3://bucket/run/{kind}', tmp_path / 'remote')
  assert store.sent
  expected = mk.open_checkpoint(tmp_path / 'local')
  merged = mk.open_checkpoint(tmp_path / 'remote')
  assert merged.specs == expected.specs
  for path in expected.specs:
    assert _bytes(merged, path) == _bytes(expected, path), path
  if kind == 'shards':
    config = (tmp_path / 'remote' / 'config.json').read_text()
    assert config == '{"model_type": "tiny"}'


def _bytes(checkpoint, path):
  return np.asarray(checkpoint.read(path)).tobytes()


@pytest.fixture
def quick(monkeypatch):
  """As many retries as ever, but sooner."""
  delays = {'initial_delay': '10ms', 'max_delay': '100ms'}
  monkeypatch.setattr(remote, '_RETRIES', {**remote._RETRIES, **delays})


def test_failures_now_and_then_do_not_matter(local, store, tmp_path, quick):
  store.fail_every = 3
  _merge('s3://bucket/run/plain', tmp_path / 'remote')
  assert {500, 503} <= {status for _, _, status, _ in store.sent}
  store.fail_every = 0
  _merge(local / 'plain', tmp_path / 'local')
  expected = checkpoints.load(tmp_path / 'local')
  for path, array in checkpoints.load(tmp_path / 'remote').items():
    assert array.tobytes() == expected[path].tobytes(), path


def test_lasting_failure_is_not_retried_forever(store, quick):
  store.fail_every = 1
  with pytest.raises(OSError, match='s3://bucket/run/plain/base'):
    mk.open_checkpoint('s3://bucket/run/plain/base')
  assert 1 < len(store.sent) <= remote._RETRIES['max_retries'] + 1


@pytest.mark.parametrize(
  'path', ['s3://no-bucket/run/plain/base', 's3://bucket/run/plain/bas']
)
def test_missing(path, store):
  with pytest.raises(FileNotFoundError, match=path):
    mk.open_checkpoint(path)
  assert len(store.sent) < 5


def test_wrong_credentials(monkeypatch, store):
  monkeypatch.setenv('AWS_ACCESS_KEY_ID', 'wrong')
  with pytest.raises(PermissionError, match='credentials'):
    mk.open_checkpoint('s3://bucket/run/plain/base')
  assert len(store.sent) < 5


def test_compressed_box_fetches_its_chunk_and_no_other_array(store):
  there = mk.open_checkpoint('s3://bucket/run/zipped/base')
  path, spec = next((p, s) for p, s in there.specs.items() if len(s.shape) == 2)
  assert there.storage(path).compressed
  store.sent.clear()
  there.read(path, index=[slice(0, 1), slice(0, 1)])
  assert 0 < store.bytes_sent < spec.size * spec.dtype.itemsize
  store.sent.clear()
  # Out of the cache of decoded chunks.
  there.read(path, index=[slice(1, 2), slice(0, 1)])
  assert store.bytes_sent == 0


def test_unknown_scheme():
  with pytest.raises(ValueError, match='az://'):
    remote.as_path('az://container/checkpoint')
