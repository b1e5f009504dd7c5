"""Writing an Orbax checkpoint block by block.

Orbax saves whole arrays that are in memory. Here its leaves are only specs: a
TypeHandler for `jax.ShapeDtypeStruct` creates the arrays and lets the caller
write boxes of them, and Orbax does everything else as in any save: temporary
directory, OCDBT merge, metadata, commit. What it writes is an ordinary
checkpoint.

This is the only file that imports private parts of Orbax; a test holds them to
the signatures used here.
"""

import asyncio
from collections.abc import Callable, Mapping, Sequence
import glob
import os
from typing import Any

from etils import epath
import jax
import numpy as np
import orbax.checkpoint as ocp
from orbax.checkpoint._src.metadata import array_metadata, array_metadata_store
from orbax.checkpoint._src.path import atomicity
from orbax.checkpoint._src.serialization import (
  jax_array_handlers,
  ocdbt_utils,
  tensorstore_utils,
)
import tensorstore as ts

from mergekit_jax import checks
from mergekit_jax.checkpoint import files, remote, source
from mergekit_jax.checkpoint.writer import BoxWriter, Write
from mergekit_jax.tree import path_of


def write_orbax(
  path: epath.PathLike,
  specs: Any,
  like: source.OrbaxLayout | None,
  produce: Callable[[Write], None],
  *,
  zarr3: bool | None = None,
  compression: str | None = None,
  chunks: Mapping[str, Sequence[int]] | None = None,
  metadata: Mapping[str, Any] | None = None,
  arrays_at: epath.Path | None = None,
) -> None:
  """Writes a checkpoint whose arrays are handed over box by box.

  Every process calls this with the same arguments and writes its own boxes.
  What a killed attempt has left in Orbax's temporary directory is kept, so that
  `produce` need only write what is missing.

  Args:
    path: top directory of the new checkpoint; it must not exist.
    specs: the tree to write, `Checkpoint.tree` or a part of it, with a
      `jax.ShapeDtypeStruct` for every array; its sharding, if any, else that of
      `like`, is recorded as the one to restore with.
    like: the layout, so that a base in `X/0/items` gives `path/0/items`; None
      means a flat OCDBT save.
    produce: called once with `write(path, index, block) -> future`, where
      `path` is the keys of an array joined by '/', `index` has one slice per
      dimension and `block` is that box of the array, on the host or a CPU
      device. The block is not copied where that can be avoided: leave it
      alone until the future's `result()` has returned. `produce` may return
      with writes under way.
    zarr3: store the arrays as zarr3, else as zarr2; None does as `like` says.
    compression: 'zstd' compresses as Orbax does by default; None does not.
    chunks: shape of the stored chunks by path; one shard if not given. No two
      processes may write to the same chunk, and a box that ends inside a chunk
      makes TensorStore read the chunk and write it again.
    metadata: custom metadata of the checkpoint, as JSON can hold it.
    arrays_at: a directory in an object store. If it is given, the arrays are
      written there, without OCDBT, whose parts would have to be merged, and
      `path`, which each process has to itself, gets everything else.

  Raises:
    ValueError: `path` has a character of patterns, there are no arrays, two
      have the same path or the same name in Orbax, one is empty, `compression`
      is unknown, or `write` is given a box that does not fit.
    BaseException: whatever `produce` raises.
  """
  path = epath.Path(path)
  if remote.is_local(path):
    path = path.absolute()
  demand_possible_path(path)
  demand_storable(specs)
  if compression is not None:
    checks.one_of('compression', compression, ['zstd'])
  like = like or source.OrbaxLayout()
  # Without a primary host each one has directories of its own.
  processes = ocp.options.MultiprocessingOptions(
    primary_host=0 if arrays_at is None else None
  )
  item_at = None if arrays_at is None else arrays_at / like.item
  handler: Any = ocp.PyTreeCheckpointHandler(
    use_ocdbt=like.use_ocdbt and arrays_at is None,
    use_zarr3=like.use_zarr3 if zarr3 is None else zarr3,
    use_compression=compression is not None,
    multiprocessing_options=processes,
    type_handler_registry=_registry(
      _StreamHandler(produce, chunks or {}, like, item_at)
    ),
  )
  save_args: Any = ocp.args.PyTreeSave(specs)
  step, _, item = like.item.rpartition('/')
  if item:
    handler = ocp.CompositeCheckpointHandler(
      # Our writes do not wait for Orbax to make the directory meanwhile.
      composite_options=ocp.CompositeOptions(
        multiprocessing_options=processes,
        temporary_path_class=_KeptTemporaryPath,
        async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      ),
      **{item: handler},
    )
    save_args = ocp.args.Composite(**{item: save_args})

  checkpointer = ocp.Checkpointer(
    handler,
    multiprocessing_options=processes,
    temporary_path_class=_KeptTemporaryPath,
  )
  checkpointer.save(
    path / step, args=save_args, custom_metadata=dict(metadata or {})
  )


class _KeptTemporaryPath(atomicity.AtomicRenameTemporaryPath):
  """Orbax's temporary directory, but one that is there is gone on with.

  And what gets its name is on the disk.
  """

  async def create(self) -> epath.Path:
    if self.get().exists():
      return self.get()
    return await super().create()

  async def finalize(self) -> None:
    if remote.is_local(self.get()):
      await asyncio.to_thread(files.sync_all, self.get())
    await super().finalize()


def demand_possible_path(path: epath.Path) -> None:
  """Raises ValueError if Orbax would not find its own files below a path."""
  if remote.is_local(path) and glob.has_magic(os.fspath(path)):
    raise ValueError(
      f'No Orbax checkpoint can be written to {path}: Orbax takes [, * and ? in'
      ' a path for a pattern, finds nothing of what it wrote there, and commits'
      ' a checkpoint without arrays. Give a path without them, links followed,'
      " or format='safetensors'."
    )


def demand_storable(specs: Any) -> None:
  """Raises ValueError if Orbax cannot store a tree.

  Then there are no arrays, two have the same path or the same name in Orbax, or
  one is empty.
  """
  leaves, stored = [], {}
  for keys, leaf in jax.tree.leaves_with_path(specs):
    if not isinstance(leaf, jax.ShapeDtypeStruct):
      continue
    path = path_of(keys)
    leaves.append((path, leaf))
    # Orbax joins keys by dots, which names of tensors contain: of two arrays
    # with one name it would keep the last.
    name = jax.tree_util.keystr(keys, simple=True, separator='.')
    if path != (other := stored.setdefault(name, path)):
      raise ValueError(
        f'{other!r} and {path!r} are both called {name!r} in Orbax, so one'
        ' would be lost. Rename one of them, or write safetensors.'
      )
    if 0 in leaf.shape:
      raise ValueError(
        f'{path} is empty (shape {leaf.shape}), and Orbax cannot store empty'
        ' arrays. Write safetensors, or take it out of the base.'
      )
  if not source.collect_specs(leaves):
    raise ValueError('The tree to write has no jax.ShapeDtypeStruct leaf.')


def _registry(handler: ocp.type_handlers.TypeHandler) -> Any:
  return ocp.type_handlers.create_type_handler_registry(
    (jax.ShapeDtypeStruct, handler),
    # Where Orbax looks up how the metadata of arrays is kept.
    (jax.Array, handler),
    (str, ocp.type_handlers.StringHandler()),
  )


class _StreamHandler(ocp.type_handlers.ArrayHandler):
  """Saves specs as if they were jax.Arrays, filled by `produce`."""

  def __init__(
    self,
    produce: Callable[[Write], None],
    chunks: Mapping[str, Sequence[int]],
    like: source.OrbaxLayout,
    item_at: epath.Path | None,
  ):
    self._metadata_store = array_metadata_store.Store()
    super().__init__(array_metadata_store=self._metadata_store)
    self._produce = produce
    self._chunks = chunks
    self._random_keys = like.random_keys
    self._shardings = like.shardings
    self._item_at = item_at
    self._context: ts.Context | None = None

  async def serialize(self, values: Any, infos, args=None):
    """Called by Orbax once, with all arrays, in the temporary directory."""
    args = args or [ocp.SaveArgs()] * len(values)
    for info in infos:
      await info.await_path_creation()
    write_specs = {
      path_of(info.keypath): self._write_spec(spec, info, arg)
      for spec, info, arg in zip(values, infos, args, strict=True)
    }
    await self._record_shardings(values, infos)
    await self._metadata_store.write(
      infos[0].parent_dir,
      [spec.metadata for spec in write_specs.values()],
      jax.process_index(),
    )
    created = await asyncio.gather(
      *(
        self._create(*self._placed(spec.json, info))
        for spec, info in zip(write_specs.values(), infos, strict=True)
      ),
      return_exceptions=True,  # once none is under way
    )
    stores = []
    for store in created:
      if isinstance(store, BaseException):
        raise store
      stores.append(store)
    writer = _Writer(
      dict(zip(write_specs, values, strict=True)),
      dict(zip(write_specs, stores, strict=True)),
    )
    try:
      self._produce(writer)
      writer.finish()
    except BaseException:
      writer.abandon()
      raise
    return []

  async def _record_shardings(self, values: Any, infos: Any) -> None:
    """Writes what a restore without a target restores the arrays with."""
    # The layout's as they are: their devices need not be here.
    recorded = [
      None if spec.sharding else self._shardings.get(path_of(info.keypath))
      for spec, info in zip(values, infos, strict=True)
    ]
    await jax_array_handlers._async_serialize_shardings(
      [
        None if text else spec.sharding or _default_sharding()
        for spec, text in zip(values, recorded, strict=True)
      ],
      infos,
      primary_host=self._primary_host,
    )
    if not ocp.multihost.is_primary_host(self._primary_host):
      return
    together = ts.Transaction()
    for info, text in zip(infos, recorded, strict=True):
      if text is not None:
        store = await ts.open(
          tensorstore_utils.get_sharding_tensorstore_spec(
            info.parent_dir.as_posix(), info.name
          ),
          open=True,
        )
        await store.with_transaction(together).write(text)
    await together.commit_async()

  def _write_spec(self, spec, info, arg) -> tensorstore_utils.ArrayWriteSpec:
    sharding = spec.sharding or _default_sharding()
    path = path_of(info.keypath)
    chunk = self._chunks.get(path)
    if chunk is None:
      chunk = sharding.shard_shape(spec.shape)
    return tensorstore_utils.build_array_write_spec(
      info,
      arg,
      global_shape=spec.shape,
      local_shape=tuple(chunk),
      dtype=spec.dtype,
      use_ocdbt=info.is_ocdbt_checkpoint,
      process_index=ocdbt_utils.get_process_index_for_subdir(
        info.is_ocdbt_checkpoint
      ),
      # Orbax restores a key from its words and this.
      ext_metadata={array_metadata.RANDOM_KEY_IMPL: self._random_keys[path]}
      if path in self._random_keys
      else None,
    )

  def _placed(self, spec: Any, info: Any) -> tuple[Any, ts.Context | None]:
    """Where TensorStore is to write an array, and in which context."""
    if self._item_at is None:
      return spec, info.ts_context
    if self._context is None:
      self._context = ts.Context(remote.context_options(self._item_at))
    kvstore = remote.kvstore(self._item_at, info.name)
    return {**spec, 'kvstore': kvstore}, self._context

  async def _create(
    self, spec: Any, context: ts.Context | None
  ) -> ts.TensorStore:
    # Each process writes to a store of its own and Orbax merges them, so the
    # metadata of an array need be in one of them only.
    if ocp.multihost.is_primary_host(self._primary_host):
      await ts.open(ts.Spec(spec), create=True, open=True, context=context)
    return await ts.open(
      ts.Spec(spec), open=True, assume_metadata=True, context=context
    )


def _default_sharding() -> jax.sharding.Sharding:
  return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])


class _Writer(BoxWriter):
  """Writes boxes through TensorStore."""

  def __init__(
    self,
    specs: Mapping[str, jax.ShapeDtypeStruct],
    stores: Mapping[str, ts.TensorStore],
  ):
    super().__init__(specs)
    self._stores = stores

  def _start(
    self, path: str, box: source.Index, block: np.ndarray
  ) -> ts.Future:
    store = self._stores[path]
    return (
      store[box].write(block, can_reference_source_data_indefinitely=True)
    ).commit
