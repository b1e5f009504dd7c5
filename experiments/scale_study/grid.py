"""The merges: all methods and hyperparameters of a subset from one read."""

from collections.abc import Iterator, Mapping
import dataclasses
import json
import statistics
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from experiments.scale_study import (
  in_memory,
  progress,
  sharding,
  stored,
  subsets,
)
from experiments.scale_study.analysis import cells
from experiments.scale_study.analysis.cells import Cell
from experiments.scale_study.folder import Arm, write_text
from experiments.scale_study.merge_points import candidates, fixed, Merge, swept
from experiments.scale_study.model import Params, STACKED_AXES
from experiments.scale_study.scored import Scored, values
from experiments.scale_study.scoring import Score
from experiments.scale_study.size import Size
from experiments.scale_study.subsets import Subset
import mergekit_jax as mk

# Behind the name of a task in the scores of a cell.
ROUGE_L = ' (ROUGE-L)'


class Result(NamedTuple):
  """A merge of an arm and how it does.

  ROUGE-L is known of the merges of all experts, chosen on validation data.
  """

  merge: Merge
  setting: str
  split: str
  scores: dict[str, Score]
  drift: float
  rouge_l: Mapping[str, float]


def subsets_of(size: Size, seed: int) -> Iterator[Subset]:
  """Yields the subsets that are merged, the same for all sizes and bases.

  Of one expert there are all: few of them would not be like the others.
  """
  categories = tuple(size.source.held_in)
  for n in size.config.merged:
    if n <= len(categories):
      count = size.config.subsets if n > 1 else len(categories)
      yield from subsets.balanced(categories, n, count, seed)


def is_done(size: Size, arm: Arm, subset: Subset) -> bool:
  """Whether all cells of a subset are stored, whole, of the models scored."""
  try:
    made = cells.load(size.folder.cells(arm, subset.name))
    merged = _fingerprints(Scored(size, arm), subset)
  except (FileNotFoundError, ValueError):
    return False
  found = sorted(map(name_of, made))
  return found == sorted(names(size, arm, subset)) and all(
    cell.checkpoints == merged for cell in made
  )


def run(size: Size, arm: Arm, flags: str) -> None:
  """Merges and scores every subset of an arm that is not done yet."""
  drawn = [*subsets_of(size, arm.seed)]
  with progress.bar(len(drawn), f'{arm.name}/merge', 'subset') as merged:
    for subset in drawn:
      if not is_done(size, arm, subset):
        made = subset_cells(size, arm, subset, flags)
        lines = (json.dumps(dataclasses.asdict(cell)) + '\n' for cell in made)
        write_text(size.folder.cells(arm, subset.name), ''.join(lines))
      merged.update()


def subset_cells(
  size: Size, arm: Arm, subset: Subset, flags: str
) -> list[Cell]:
  """Merges a subset by every method and returns its cells.

  Args:
    size: of the models.
    arm: whose experts are merged.
    subset: of them.
    flags: of the command that would do it again.
  """
  scored = Scored(size, arm)
  results = _results(size, arm, subset, scored)
  return [_cell(size, arm, subset, scored, result, flags) for result in results]


def name_of(cell: Cell) -> str:
  """Names a cell for `--cell`."""
  return _name(
    Arm(cell.size, cell.base, cell.seed),
    f'{cell.n}.{cell.subset_number}',
    Merge.of(cell.method, cell.hyperparameters),
    cell.setting,
    cell.split,
  )


def names(size: Size, arm: Arm, subset: Subset) -> list[str]:
  """Names the cells of a subset, which need not be made yet."""
  settled = fixed(size.config).values()
  made = [
    *((merge, 'validated', 'test') for merge in settled),
    *((merge, 'fixed', 'test') for merge in settled),
    *(
      (merge, 'sweep', split)
      for split in ('validation', 'test')
      for merge in _swept_of(size, subset)
    ),
  ]
  return [_name(arm, subset.name, *of) for of in made]


def _name(arm: Arm, subset: str, merge: Merge, setting: str, split: str) -> str:
  names = [arm.name, subset, merge.method, setting]
  if setting == 'sweep':
    point = sorted(merge.values.items())
    names += [split, ','.join(f'{name}={x:g}' for name, x in point)]
  return '/'.join(names)


def _swept_of(size: Size, subset: Subset) -> list[Merge]:
  """The points of the sweeps, which are of all experts."""
  everything = len(subset.categories) == len(size.source.held_in)
  return swept(size.config) if everything else []


def _results(
  size: Size, arm: Arm, subset: Subset, scored: Scored
) -> list[Result]:
  """Merges once, and scores what is needed of each merge."""
  config, exam = size.config, size.examination
  choices, settled = candidates(config), fixed(config)
  everything = len(subset.categories) == len(size.source.held_in)
  points = _swept_of(size, subset)
  wanted = list(
    dict.fromkeys([*sum(choices.values(), []), *settled.values(), *points])
  )
  experts = [
    size.folder.root / scored.experts[category]['checkpoint']
    for category in subset.categories
  ]
  base = size.load(size.base(arm))
  _demand_as_scored(size, arm, base, scored.base)
  for category, path in zip(subset.categories, experts, strict=True):
    _demand_as_scored(size, arm, size.load(path), scored.experts[category])
  places = jax.tree.map(lambda leaf: leaf.sharding, base)
  own = scored.expert_values('validation')
  validated: dict[Merge, dict[str, Score]] = {}
  tested: dict[Merge, dict[str, Score]] = {}
  drifts: dict[Merge, float] = {}
  written: dict[str, dict[str, float]] = {}
  best: dict[str, tuple[float, Merge, Params]] = {}
  names = iter(wanted)

  def evaluate(checkpoint: Any) -> None:
    merge = next(names)
    params = jax.device_put(checkpoint[stored.ROOT], places)
    drifts[merge] = float(_drift(params, base))
    options = choices[merge.method]
    if len(options) > 1 and merge in options or merge in points:
      validated[merge] = exam.scores(params, 'validation', subset.categories)
    if merge in settled.values() or merge in points:
      tested[merge] = exam.scores(params, 'test')
    if merge in options:
      kept = _kept(validated[merge], own) if merge in validated else 0.0
      if merge.method not in best or kept > best[merge.method][0]:
        best[merge.method] = kept, merge, params

  with size.on_mesh():
    mk.sweep(
      {' '.join(merge): merge.rule() for merge in wanted},
      experts,
      size.base(arm),
      evaluate,
      seed=arm.seed,
      stacked_axes=STACKED_AXES,
      mesh=size.mesh,
      memory_budget=config.memory_budget,
      partition_rules=sharding.PARTITION_RULES if size.mesh else None,
    )
    for method, (_, merge, params) in best.items():
      if merge not in tested:
        tested[merge] = exam.scores(params, 'test')
      if everything:
        written[method] = exam.written(params)
  if config.strict and everything:
    # On one device, whatever the mesh of the streamed merges.
    in_memory.demand_same(
      {
        method: (merge.rule(), params)
        for method, (_, merge, params) in best.items()
      },
      [stored.load(path, size.shape) for path in experts],
      stored.load(size.base(arm), size.shape),
      arm.seed,
    )
  chosen = {method: merge for method, (_, merge, _) in best.items()}
  none: dict[str, float] = {}
  return [
    *(
      Result(
        *(merge, 'validated', 'test', tested[merge], drifts[merge]),
        rouge_l=written.get(merge.method, none),
      )
      for merge in chosen.values()
    ),
    *(
      Result(merge, 'fixed', 'test', tested[merge], drifts[merge], none)
      for merge in settled.values()
    ),
    *(
      Result(merge, 'sweep', split, scores[merge], drifts[merge], none)
      for split, scores in (('validation', validated), ('test', tested))
      for merge in points
    ),
  ]


def _fingerprints(scored: Scored, subset: Subset) -> dict[str, Any]:
  """Fingerprints of what is merged, as cells have them."""
  return {
    'base': scored.base['fingerprint'],
    'experts': {
      category: scored.experts[category]['fingerprint']
      for category in subset.categories
    },
  }


def _demand_as_scored(
  size: Size, arm: Arm, params: Params, record: Any
) -> None:
  """Raises ValueError if a model was trained anew after it was scored."""
  if stored.fingerprint(params) != record['fingerprint']:
    raise ValueError(
      f'{size.folder.root / record["checkpoint"]} is not the model that was '
      f'scored. Remove scores/{arm.name} and cells/{arm.name}, and do '
      '--phase=evaluate again.'
    )


def _kept(scores: Mapping[str, Score], own: Mapping[str, float]) -> float:
  """Mean over tasks of merge ÷ expert; an expert that fails counts little."""
  return statistics.fmean(
    score.value / max(own[task], 0.05) for task, score in scores.items()
  )


@jax.jit
def _drift(params: Params, base: Params) -> jax.Array:
  def norm(tree: Params) -> jax.Array:
    return jnp.sqrt(sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(tree)))

  return norm(jax.tree.map(jnp.subtract, params, base)) / norm(base)


def _cell(
  size: Size,
  arm: Arm,
  subset: Subset,
  scored: Scored,
  result: Result,
  flags: str,
) -> Cell:
  tasks = list(result.scores)
  of_subset = [
    task for task in tasks if cells.category(task) in subset.categories
  ]
  held_in = [
    task for task in tasks if cells.category(task) in size.source.held_in
  ]
  name = _name(arm, subset.name, result.merge, result.setting, result.split)
  cell = Cell(
    command=f'python -m experiments.scale_study {flags} --cell={name}',
    size=size.name,
    parameters=size.parameters,
    base=arm.base,  # type: ignore[arg-type]
    method=result.merge.method,
    n=len(subset.categories),
    subset=subset.categories,
    subset_number=subset.number,
    seed=arm.seed,
    setting=result.setting,  # type: ignore[arg-type]
    hyperparameters=result.merge.values,
    checkpoints=_fingerprints(scored, subset),
    drift=result.drift,
    loss=statistics.fmean(result.scores[task].loss for task in of_subset),
    losses={task: round(result.scores[task].loss, 6) for task in held_in},
    scores={
      **{task: score.value for task, score in result.scores.items()},
      **{task + ROUGE_L: value for task, value in result.rouge_l.items()},
    },
    expert=scored.expert_values(result.split),
    base_scores=values(scored.base, result.split),
    multitask=values(scored.multitask, result.split),
    held_in=tuple(held_in),
    held_out=tuple(task for task in tasks if task not in held_in),
    split=result.split,  # type: ignore[arg-type]
  )
  cells.validate(cell)
  return cell
