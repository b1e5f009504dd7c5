"""What differs between checkpoints on local disks and in object stores.

TensorStore reads both, also the small files: epath could only read them with
further packages, and with other credentials and retries than the weights.
Endpoint, region and credentials are those of the usual environment variables.
"""

from collections.abc import Iterator
import io
import os
from typing import Any

from etils import epath
from etils.epath import gpath
import tensorstore as ts

_DRIVERS = {'s3': 's3', 'gs': 'gcs'}
# TensorStore's own 32 retries keep a wrong host secret for over ten minutes.
# These take about 6 seconds together.
_RETRIES = {'max_retries': 6, 'initial_delay': '100ms', 'max_delay': '5s'}
_DENIED = ('PERMISSION_DENIED', 'UNAUTHENTICATED')
_DENIED_CODES = ("http_response_code='401'", "http_response_code='403'")


def is_local(path: epath.PathLike) -> bool:
  return '://' not in os.fspath(path)


def as_path(path: epath.PathLike) -> epath.Path:
  """The path, read by TensorStore if it is in an object store.

  Raises:
    ValueError: it is empty, or there is no driver for its scheme.
  """
  # Else the working directory, which nobody has named.
  if not os.fspath(path):
    raise ValueError(
      'An empty path was given; give that of a checkpoint or of an output. The '
      "working directory is '.'."
    )
  if is_local(path):
    return epath.Path(path).expanduser()
  scheme = os.fspath(path).partition('://')[0]
  if scheme not in _DRIVERS:
    raise ValueError(
      f'{path}: {scheme}:// is not supported. Give a local'
      f' path, or one of {", ".join(f"{known}://" for known in _DRIVERS)}.'
    )
  return RemotePath(path)


def real_path(path: epath.Path) -> epath.Path:
  """The path without symbolic links, where there can be any."""
  return epath.Path(os.path.realpath(path)) if is_local(path) else path


def demand_possible_output(path: epath.Path, format: str) -> None:
  """Raises ValueError if no output of a format can be written to `path`."""
  if is_local(path):
    return
  if len(path.parts) <= 3:
    raise ValueError(
      f'output={os.fspath(path)} is a whole bucket. Give a path in it.'
    )
  if format == 'safetensors':
    raise ValueError(
      f'output={os.fspath(path)} is in an object store, and safetensors files'
      " are written in place, which objects cannot be. Give format='orbax', or"
      ' a local directory and copy it when it is done.'
    )


def kvstore(path: epath.Path, inside: str = '') -> dict[str, Any]:
  """TensorStore's spec of a directory, or of `inside` it."""
  if is_local(path):
    return {'driver': 'file', 'path': f'{os.fspath(path)}/{inside}'}
  _, scheme, bucket, *keys = path.parts
  spec = {
    'driver': _DRIVERS[scheme],
    'bucket': bucket,
    'path': ''.join(f'{key}/' for key in keys) + inside,
  }
  endpoint = os.environ.get('AWS_ENDPOINT_URL_S3') or os.environ.get(
    'AWS_ENDPOINT_URL'
  )
  # TensorStore does not look at these variables. Without an endpoint it asks
  # for the bucket's region, which need not be the one of the environment.
  if scheme == 's3' and endpoint:
    spec['endpoint'] = endpoint.rstrip('/')
    spec['aws_region'] = (
      os.environ.get('AWS_REGION')
      or os.environ.get('AWS_DEFAULT_REGION')
      or 'us-east-1'
    )
  return spec


def context_options(path: epath.Path) -> dict[str, Any]:
  """How TensorStore should read there."""
  if is_local(path):
    # A chunk is a device's shard at save time and may be as large as the
    # array. Without this every box of it would read all of it.
    return {'file_io_mode': {'mode': 'memmap'}}
  options: dict[str, Any] = {
    's3_request_retries': _RETRIES,
    'gcs_request_retries': _RETRIES,
  }
  # The chain of all providers logs an error for each one that finds nothing.
  if {'AWS_ACCESS_KEY_ID', 'AWS_SECRET_ACCESS_KEY'} <= os.environ.keys():
    options['aws_credentials'] = {'type': 'environment'}
  return options


def translated(error: Exception, path: epath.PathLike) -> Exception:
  """What TensorStore says of a remote failure, as the OSError it is.

  TensorStore has ValueError for most of them. Bytes behind the end of an object
  are an EOFError.
  """
  text = str(error)
  if text.startswith('OUT_OF_RANGE'):
    return EOFError(f'{path} is cut off: {text}')
  if text.startswith('NOT_FOUND'):
    return FileNotFoundError(f'There is nothing at {path}: {text}')
  if text.startswith(_DENIED) or any(code in text for code in _DENIED_CODES):
    return PermissionError(
      f'Access to {path} was denied. Check the credentials in the environment'
      f' (AWS_ACCESS_KEY_ID, AWS_PROFILE, ...): {text}'
    )
  return OSError(f'{path} could not be read or written: {text}')


def wait(future: Any, path: epath.PathLike) -> Any:
  """The result; a remote failure is the OSError it is."""
  try:
    return future.result()
  except Exception as error:
    raise translated(error, path) from error


def open_store(directory: epath.Path) -> ts.KvStore:
  """The objects below a remote directory."""
  context = ts.Context(context_options(directory))
  return wait(ts.KvStore.open(kvstore(directory), context=context), directory)


class Read:
  """A read under way in an object store; failures are OSErrors."""

  def __init__(self, future: Any, path: epath.Path):
    self._future = future
    self._path = path

  @classmethod
  def of(cls, future: Any, path: epath.Path) -> Any:
    """The read; as it is if it is from a local disk."""
    return future if is_local(path) else cls(future, path)

  def result(self) -> Any:
    return wait(self._future, self._path)


class RemotePath(gpath.PosixGPath):
  """A path in an object store.

  A directory is there if any object's key lies below it.
  """

  def exists(self) -> bool:
    return self.is_file() or self.is_dir()

  def is_dir(self) -> bool:
    return bool(self._keys())

  def is_file(self) -> bool:
    if len(self.parts) <= 3:
      return False
    store = open_store(self.parent)
    # No byte is sent for this.
    read = store.read(self.name, byte_range=slice(0, 0))
    return wait(read, self).state == 'value'

  def iterdir(self) -> Iterator['RemotePath']:
    names = {key.partition('/')[0] for key in self._keys()}
    for name in sorted(names - {''}):
      yield self / name

  def walk_files(self) -> list['RemotePath']:
    """All objects below it: one listing, where iterdir needs one a level."""
    return [self / key for key in self._keys() if not key.endswith('/')]

  def open(self, mode: str = 'r', **kwargs: Any) -> Any:
    if mode not in ('r', 'rb'):
      raise ValueError(
        f'{self} can be opened for reading only, not with {mode!r}.'
      )
    data = io.BytesIO(self._read().value)
    return data if mode == 'rb' else io.TextIOWrapper(data, encoding='utf-8')

  def write_bytes(self, data: bytes) -> int:
    wait(open_store(self.parent).write(self.name, data), self)
    return len(data)

  def write_text(self, data: str, *args: Any, **kwargs: Any) -> int:
    return self.write_bytes(data.encode())

  def unlink(self, missing_ok: bool = False) -> None:
    wait(open_store(self.parent).write(self.name, None), self)

  def rmtree(self, missing_ok: bool = False) -> None:
    wait(open_store(self).delete_range(ts.KvStore.KeyRange()), self)

  def absolute(self) -> 'RemotePath':
    return self

  def _read(self) -> Any:
    result = wait(open_store(self.parent).read(self.name), self)
    if result.state != 'value':
      raise FileNotFoundError(f'There is nothing at {self}.')
    return result

  def _keys(self) -> list[str]:
    """The keys of all objects below it, relative to it."""
    keys = wait(open_store(self).list(), self)
    return [key.decode() for key in keys]
