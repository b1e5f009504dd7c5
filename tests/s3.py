"""An S3-compatible server on this machine, and a proxy that watches it."""

import contextlib
import http.client
import http.server
import subprocess
import sys
import threading

import boto3

KEY = 'a-key'
SECRET = 'secret'
BUCKET = 'bucket'
_DENIED = (
  b'<Error><Code>InvalidAccessKeyId</Code><Message>No such key.</Message>'
  b'</Error>'
)


class Proxy(http.server.ThreadingHTTPServer):
  """Passes requests on to the server, counts them, and fails when told to.

  Attributes:
    client: a boto3 client of the server itself.
    sent: the method, path and status of each request, and the bytes answered.
    fail_every: n makes every n-th request fail, 1 all of them; 0 none.
  """

  daemon_threads = True
  # Of more than five at once the others would be dropped, and try again after a
  # second.
  request_queue_size = 128

  def __init__(self, port):
    super().__init__(('127.0.0.1', 0), _Handler)
    self.upstream = port
    self.client = boto3.client(
      's3',
      endpoint_url=f'http://127.0.0.1:{port}',
      aws_access_key_id=KEY,
      aws_secret_access_key=SECRET,
      region_name='us-east-1',
    )
    self.sent = []
    self.fail_every = 0
    self.lock = threading.Lock()

  @property
  def environment(self):
    """What a program needs to find the server."""
    return {
      'AWS_ENDPOINT_URL': f'http://127.0.0.1:{self.server_port}',
      'AWS_ACCESS_KEY_ID': KEY,
      'AWS_SECRET_ACCESS_KEY': SECRET,
    }

  @contextlib.contextmanager
  def used(self, monkeypatch):
    """This process talks to it, and it counts from 0."""
    for name, value in self.environment.items():
      monkeypatch.setenv(name, value)
    monkeypatch.delenv('AWS_ENDPOINT_URL_S3', raising=False)
    self.sent.clear()
    yield
    self.fail_every = 0

  @property
  def bytes_sent(self):
    return sum(size for *_, size in self.sent)

  def upload(self, directory, prefix):
    """Uploads all files below a directory."""
    for file in directory.rglob('*'):
      if file.is_file():
        key = f'{prefix}/{file.relative_to(directory).as_posix()}'
        self.client.upload_file(str(file), BUCKET, key)

  def download(self, prefix, directory):
    """Downloads all objects below a prefix."""
    for key in self.keys(prefix):
      file = directory / key
      file.parent.mkdir(parents=True, exist_ok=True)
      self.client.download_file(BUCKET, f'{prefix}/{key}', str(file))
    return directory

  def keys(self, prefix):
    """The keys of all objects below a prefix, relative to it."""
    pages = self.client.get_paginator('list_objects_v2').paginate(
      Bucket=BUCKET, Prefix=f'{prefix}/'
    )
    return [
      entry['Key'].removeprefix(f'{prefix}/')
      for page in pages
      for entry in page.get('Contents', ())
    ]

  def answer(self, method, path, headers, body):
    with self.lock:
      self.sent.append([method, path, None, 0])
      entry, number = self.sent[-1], len(self.sent)
    if KEY not in headers.get('Authorization', ''):
      status, fields, body = 403, {}, _DENIED
    elif self.fail_every and number % self.fail_every == 0:
      status = (500, 503)[number // self.fail_every % 2]
      fields, body = {}, b''
    else:
      connection = http.client.HTTPConnection('127.0.0.1', self.upstream)
      connection.request(method, path, body, dict(headers))
      response = connection.getresponse()
      status, fields = response.status, dict(response.getheaders())
      body = response.read()
      connection.close()
    entry[2:] = [status, len(body)]
    return status, fields, body


class _Handler(http.server.BaseHTTPRequestHandler):
  server: Proxy

  def do_GET(self):  # noqa: N802
    given = self.rfile.read(int(self.headers.get('Content-Length', 0)))
    status, fields, body = self.server.answer(
      self.command, self.path, self.headers, given
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

  do_HEAD = do_PUT = do_DELETE = do_GET  # noqa: N815

  def log_message(self, format, *args):
    """Keeps requests out of the output of the tests."""


@contextlib.contextmanager
def serving():
  """Runs a server with an empty bucket; gives the proxy before it."""
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
    with Proxy(port) as proxy:
      proxy.client.create_bucket(Bucket=BUCKET)
      threading.Thread(target=proxy.serve_forever, daemon=True).start()
      yield proxy
      proxy.shutdown()
  finally:
    process.terminate()
    process.wait()
