"""Sources in an object store, against an S3-compatible server."""

import http.client
import http.server
import subprocess
import sys
import threading

import boto3
import numpy as np
import pytest

import mergekit_jax as mk
from mergekit_jax.checkpoint import remote, stage
from tests import checkpoints

_KEY = 'a-key'
_DENIED = (
  b'<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message>'
  b'</Error>'
)
_NAMES = ('base', 'expert0', 'expert1')


class _Proxy(http.server.ThreadingHTTPServer):
  """Passes requests on to the server, counts them, and fails when told to.

  Attributes:
    sent: the method, path and status of each request, and the bytes answered.
    fail_every: n makes every n-th request fail, 1 all of them; 0 none.
  """

  daemon_threads = True

  def __init__(self, port):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.upstream = port
    self.sent = []
    self.fail_every = 0
    self.lock = threading.Lock()

  def answer(self, method, path, headers):
    with self.lock:
      self.sent.append([method, path, None, 0])
      entry, number = self.sent[-1], len(self.sent)
    if _KEY not in headers.get('Authorization', ''):
      status, fields, body = 403, {}, _DENIED
    elif self.fail_every and number % self.fail_every == 0:
      status, fields, body = (500, 503)[number % 2], {}, b''
    else:
      connection = http.client.HTTPConnection('127.0.0.1', self.upstream)
      connection.request(method, path, headers=dict(headers))
      response = connection.getresponse()
      status, fields = response.status, dict(response.getheaders())
      body = response.read()
      connection.close()
    entry[2:] = [status, len(body)]
    return status, fields, body


class _Handler(http.server.BaseHTTPRequestHandler):
  server: _Proxy

  def do_GET(self):  # noqa: N802
    status, fields, body = self.server.answer(
      self.command, self.path, self.headers
    )
    self.send_response(status)
    for name, value in fields.items():
      if name.lower() not in ('content-length', 'connection', 'date', 'server'):
        self.send_header(name, value)
    length = fields.get('Content-Length', '0')
    head = self.command == 'HEAD'
    self.send_header('Content-Length', length if head else str(len(body)))
    self.end_headers()
    if not head:
      self.wfile.write(body)

  do_HEAD = do_GET  # noqa: N815

  def log_message(self, format, *args):
    """Keeps requests out of the output of the tests."""


@pytest.fixture(scope='module')
def local(tmp_path_factory):
  """A directory with a base and two experts in plain/, and in zipped/."""
  directory = tmp_path_factory.mktemp('local')
  shapes = {'a': (64, 48), 'b': (40,)}
  checkpoints.save_set(directory / 'plain', shapes, experts=2)
  checkpoints.save_set(directory / 'zipped', shapes, experts=2, compress=True)
  return directory


@pytest.fixture(scope='module')
def server(local):
  """A server that holds what `local` holds, behind a proxy."""
  process = subprocess.Popen(
    [sys.executable, '-m', 'moto.server', '-H', '127.0.0.1', '-p', '0'],
    stderr=subprocess.PIPE,
    text=True,
  )
  try:
    # The server says which port it was given.
    for line in process.stderr:
      if 'Running on http://127.0.0.1:' in line:
        port = int(line.split('127.0.0.1:')[1].split()[0].rstrip('/'))
        break
    else:
      raise RuntimeError('The S3 server did not start.')
    # A full pipe would stop the server.
    threading.Thread(target=process.stderr.read, daemon=True).start()
    client = boto3.client(
      's3',
      endpoint_url=f'http://127.0.0.1:{port}',
      aws_access_key_id=_KEY,
      aws_secret_access_key='secret',
      region_name='us-east-1',
    )
    client.create_bucket(Bucket='bucket')
    for file in local.rglob('*'):
      if file.is_file():
        key = file.relative_to(local).as_posix()
        client.upload_file(str(file), 'bucket', f'run/{key}')
    client.put_object(Bucket='bucket', Key='hf/m.safetensors', Body=b'0' * 99)
    with _Proxy(port) as proxy:
      threading.Thread(target=proxy.serve_forever, daemon=True).start()
      yield proxy
      proxy.shutdown()
  finally:
    process.terminate()
    process.wait()


@pytest.fixture(autouse=True)
def store(server, monkeypatch):
  monkeypatch.setenv(
    'AWS_ENDPOINT_URL', f'http://127.0.0.1:{server.server_port}'
  )
  monkeypatch.setenv('AWS_ACCESS_KEY_ID', _KEY)
  monkeypatch.setenv('AWS_SECRET_ACCESS_KEY', 'secret')
  monkeypatch.delenv('AWS_ENDPOINT_URL_S3', raising=False)
  server.sent.clear()
  yield server
  server.fail_every = 0


def _merge(directory, output):
  base, *experts = (f'{directory}/{name}' for name in _NAMES)
  return mk.merge_checkpoints(
    mk.task_arithmetic(scale=0.7), base=base, experts=experts, output=output
  )


@pytest.mark.parametrize('kind', ['plain', 'zipped'])
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


@pytest.mark.parametrize('kind', ['plain', 'zipped'])
def test_merge_equals_the_local_one(local, kind, store, tmp_path):
  _merge(local / kind, tmp_path / 'local')
  assert not store.sent
  _merge(f's3://bucket/run/{kind}', tmp_path / 'remote')
  assert store.sent
  expected = checkpoints.load(tmp_path / 'local')
  merged = checkpoints.load(tmp_path / 'remote')
  assert merged.keys() == expected.keys()
  for path, array in expected.items():
    assert merged[path].tobytes() == array.tobytes(), path


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


def test_box_fetches_its_chunk_and_no_other_array(store):
  there = mk.open_checkpoint('s3://bucket/run/plain/base')
  path, spec = next((p, s) for p, s in there.specs.items() if len(s.shape) == 2)
  assert there.storage(path).compressed
  store.sent.clear()
  there.read(path, index=[slice(0, 1), slice(0, 1)])
  fetched = sum(size for *_, size in store.sent)
  chunk = spec.dtype.itemsize * np.prod(there.storage(path).chunk)
  assert chunk <= fetched < 1.2 * chunk
  store.sent.clear()
  # Out of the cache of decoded chunks.
  there.read(path, index=[slice(1, 2), slice(0, 1)])
  assert sum(size for *_, size in store.sent) == 0


def test_output_must_be_local(store, tmp_path):
  with pytest.raises(ValueError, match='local directory'):
    _merge('s3://bucket/run/plain', 's3://bucket/merged')
  with pytest.raises(ValueError, match='local directory'):
    with stage.staged('s3://bucket/merged', {}, overwrite=False, resume=True):
      raise AssertionError('a remote stage was opened')
  assert not store.sent


def test_safetensors_must_be_local():
  with pytest.raises(ValueError, match='local'):
    mk.open_checkpoint('s3://bucket/hf')


def test_unknown_scheme():
  with pytest.raises(ValueError, match='az://'):
    remote.as_path('az://container/checkpoint')


def test_gs_has_the_same_specs_but_for_the_driver():
  path = remote.as_path('gs://bucket/run/0/items')
  assert remote.kvstore(path, 'x') == {
    'driver': 'gcs',
    'bucket': 'bucket',
    'path': 'run/0/items/x',
  }
