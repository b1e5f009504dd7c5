"""What arrays an Orbax item holds, and in which tree, as Orbax says."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp

from mergekit_jax.checkpoint import remote

# What Orbax calls the types whose leaves are stored as arrays.
_ARRAY_TYPES = {
  'jax.Array': jax.Array,
  'np.ndarray': np.ndarray,
  'scalar': np.number,
}


def read(
  item: epath.Path, open_all: Callable[[Sequence[str]], list[Any]]
) -> Any:
  """Orbax's metadata of a tree.

  Args:
    item: the directory that holds `_METADATA`.
    open_all: opens arrays by Orbax's names for them; for remote items only,
      whose arrays Orbax would open without our endpoint and retries.

  Raises:
    ValueError: the metadata is damaged.
    PermissionError: it may not be read.
    OSError: it cannot be read or, if it is remote, reached.
  """
  options: dict[str, Any] = {}
  if not remote.is_local(item):
    options['type_handler_registry'] = _registry(open_all)
  try:
    handler = ocp.PyTreeCheckpointHandler(**options)
    return handler.metadata(item).tree
  except Exception as error:
    # TensorStore has ValueError for this too.
    denied = str(error).startswith('PERMISSION_DENIED')
    if denied or isinstance(error, PermissionError):
      raise PermissionError(
        f'{item} cannot be read, for want of permission ({error}). Change the'
        ' permissions of its files.'
      ) from error
    missing = remote.is_local(item) and isinstance(error, FileNotFoundError)
    if isinstance(error, OSError) and not missing:
      raise
    raise ValueError(
      f'{item} is damaged: Orbax cannot read the metadata of its arrays'
      f' ({error}). Restore it from a copy.'
    ) from error


def _children(node: Any) -> list[tuple[str, Any]] | None:
  if isinstance(node, dict):
    return [(str(key), child) for key, child in node.items()]
  if isinstance(node, (list, tuple)):
    return [(str(key), child) for key, child in enumerate(node)]
  return None


def _is_array(leaf: Any) -> bool:
  return isinstance(
    leaf, (ocp.metadata.ArrayMetadata, ocp.metadata.ScalarMetadata)
  )


def arrays(node: Any, keys: tuple[str, ...] = ()) -> Iterator[tuple[str, Any]]:
  children = _children(node)
  if children is not None:
    for key, child in children:
      yield from arrays(child, (*keys, key))
  elif _is_array(node):
    yield '/'.join(keys), node


def plain(
  node: Any, strings: dict[str, str], keys: tuple[str, ...] = ()
) -> Any:
  """The tree with plain leaves: an array is its path."""
  if isinstance(node, dict):
    return {
      key: plain(child, strings, (*keys, str(key)))
      for key, child in node.items()
    }
  if isinstance(node, (list, tuple)):
    return type(node)(
      plain(child, strings, (*keys, str(key))) for key, child in enumerate(node)
    )
  if isinstance(node, ocp.metadata.StringMetadata):
    return strings[node.name]
  return '/'.join(keys) if _is_array(node) else node


class _RemoteMetadata(ocp.type_handlers.ArrayHandler):
  """Tells Orbax the shapes of arrays that we opened."""

  def __init__(
    self, typestr: str, open_all: Callable[[Sequence[str]], list[Any]]
  ):
    super().__init__()
    self._typestr = typestr
    self._open_all = open_all

  def typestr(self) -> str:
    return self._typestr

  async def metadata(self, infos: Sequence[Any]) -> Sequence[Any]:
    stores = self._open_all([info.name for info in infos])
    return [
      ocp.metadata.ArrayMetadata(
        name=info.name,
        directory=info.parent_dir,
        shape=store.shape,
        sharding=None,
        dtype=store.dtype.numpy_dtype,
      )
      for info, store in zip(infos, stores, strict=True)
    ]


def _registry(open_all: Callable[[Sequence[str]], list[Any]]) -> Any:
  return ocp.type_handlers.create_type_handler_registry(
    *(
      (type_, _RemoteMetadata(typestr, open_all))
      for typestr, type_ in _ARRAY_TYPES.items()
    ),
    (str, ocp.type_handlers.StringHandler()),
  )
