"""The sources of a merge: opened, and found to hold whole models."""

from __future__ import annotations

from collections.abc import Sequence
import os

from etils import epath

from mergekit_jax import checks, roots, tree
from mergekit_jax.checkpoint import Checkpoint, open_checkpoint
from mergekit_jax.checkpoint.safetensors import SafetensorsCheckpoint
from mergekit_jax.streaming.reading import Model


def opened(
  experts: Sequence[epath.PathLike], base: epath.PathLike | None
) -> list[Model]:
  """The sources, the base first if there is one."""
  experts = checks.experts(experts)
  named = [('base', base)] if base is not None else []
  named += [(f'experts[{i}]', path) for i, path in enumerate(experts)]
  for name, path in named:
    if not isinstance(path, (str, os.PathLike)):
      raise ValueError(
        f'{name} is a {type(path).__name__}; give the path of a checkpoint. '
        'Trees in memory are merged by mergekit_jax.merge.'
      )
  checkpoints = [(name, open_checkpoint(path)) for name, path in named]
  _demand_no_adapter(checkpoints)
  root = roots.parameter_root(checkpoints[0][1].specs)
  models = [
    Model(name, checkpoint, roots.moved(checkpoint.specs, root))
    for name, checkpoint in checkpoints
  ]
  for model in models:
    what = f'{model.name} ({model.checkpoint.path})'
    roots.demand_parameters(what, model.checkpoint.specs, model.paths)
  return models


def _demand_no_adapter(checkpoints: Sequence[tuple[str, Checkpoint]]) -> None:
  """Refuses adapters among whole models, which have no leaf in common."""
  adapters = [
    f'{name} ({checkpoint.path})'
    for name, checkpoint in checkpoints
    if isinstance(checkpoint, SafetensorsCheckpoint) and _is_adapter(checkpoint)
  ]
  if 0 < len(adapters) < len(checkpoints):
    raise ValueError(
      f'{adapters[0]} is a PEFT adapter, and not all of the others are. Put '
      'each into its model first: merge_and_unload(), then save_pretrained().'
    )


def _is_adapter(checkpoint: SafetensorsCheckpoint) -> bool:
  """Whether it holds an adapter alone.

  The configuration of one may be left over where it was put into its model.
  """
  configuration = checkpoint.files()[0].parent / 'adapter_config.json'
  return configuration.exists() and (
    checkpoint.stem == 'adapter_model'
    or bool(tree.lora_factors(checkpoint.specs))
  )
