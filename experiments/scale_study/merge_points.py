"""The merges that a preset asks for, of every subset alike."""

from collections.abc import Mapping
import inspect
import itertools
import json
from typing import Any, NamedTuple

from experiments.scale_study.analysis import cells
from experiments.scale_study.study_config import StudyConfig
import mergekit_jax as mk
from mergekit_jax import checks


class Merge(NamedTuple):
  """A method and its hyperparameters, as JSON so that it can be a key."""

  method: str
  hyperparameters: str

  @classmethod
  def of(cls, method: str, hyperparameters: Mapping[str, float]) -> 'Merge':
    """Makes a key."""
    return cls(method, json.dumps(dict(hyperparameters), sort_keys=True))

  @property
  def values(self) -> dict[str, float]:
    """Hyperparameters by name."""
    return json.loads(self.hyperparameters)

  def rule(self) -> Any:
    """Returns the merge rule."""
    return getattr(mk, self.method)(**self.values)


def candidates(config: StudyConfig) -> dict[str, list[Merge]]:
  """Returns, by method, what is chosen from on validation data."""
  return {
    method: [
      Merge.of(
        method, {**grid.fixed, **dict(zip(grid.choices, values, strict=True))}
      )
      for values in itertools.product(*grid.choices.values())
    ]
    for method, grid in config.methods.items()
  }


def fixed(config: StudyConfig) -> dict[str, Merge]:
  """Returns, by method, what is used for all merges alike."""
  return {
    method: Merge.of(method, grid.fixed)
    for method, grid in config.methods.items()
  }


def swept(config: StudyConfig) -> list[Merge]:
  """Returns the points of the sweeps."""
  points = [
    Merge.of(method, {**config.methods[method].fixed, name: value})
    for method, parameters in config.sweeps.items()
    for name, values in parameters.items()
    for value in values
  ]
  return list(dict.fromkeys(points))


def demand_rules(config: StudyConfig) -> None:
  """Checks that every merge of a preset can be made and analysed.

  Raises:
    ValueError: if one cannot; the message names it.
  """
  for method in config.methods:
    try:
      checks.one_of('a name in methods', method, cells.METHODS)
    except ValueError as error:
      raise ValueError(
        f'{error} Another joins them by an entry in '
        'experiments/scale_study/analysis/methods.py.'
      ) from error
    if not hasattr(mk, method):
      raise ValueError(
        f'There is no mergekit_jax.{method}, which methods names: if it is '
        f'yours, set mergekit_jax.{method} in the preset.'
      )
  for method in config.sweeps:
    checks.one_of('a name in sweeps', method, [*config.methods])
  for merge in (
    *itertools.chain(*candidates(config).values()),
    *fixed(config).values(),
    *swept(config),
  ):
    known = [*inspect.signature(getattr(mk, merge.method)).parameters]
    for name in merge.values:
      checks.one_of(f'a hyperparameter of {merge.method}', name, known)
    try:
      merge.rule()
    except (TypeError, ValueError) as error:
      raise ValueError(
        f'{merge.method} of the preset with {merge.values}: {error}'
      ) from error
