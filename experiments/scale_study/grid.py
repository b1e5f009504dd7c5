"""The merges: all methods and hyperparameters of a subset from one read."""

from collections.abc import Iterator
import dataclasses
import json
import statistics
from typing import Any

import jax

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
from experiments.scale_study.merge_points import fixed, Merge
from experiments.scale_study.model import STACKED_AXES
from experiments.scale_study.scored import (
  demand_as_scored,
  Scored,
  values,
)
from experiments.scale_study.size import Size
from experiments.scale_study.subsets import Subset
from experiments.scale_study.trials import (
  is_everything,
  Result,
  swept_of,
  Trials,
)
import mergekit_jax as mk

# Behind the name of a task in the scores of a cell.
ROUGE_L = ' (ROUGE-L)'


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
    scored = Scored(size, arm)
  except (FileNotFoundError, ValueError):
    return False
  merged = _fingerprints(scored, subset)
  found = sorted(map(name_of, made))
  return found == sorted(names(size, arm, subset)) and all(
    cell.checkpoints == merged
    and cell.expert == scored.expert_values(cell.split)
    and cell.base_scores == values(scored.base, cell.split)
    and cell.multitask == values(scored.multitask, cell.split)
    for cell in made
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
      for merge in swept_of(size, subset)
    ),
  ]
  return [_name(arm, subset.name, *of) for of in made]


def _name(arm: Arm, subset: str, merge: Merge, setting: str, split: str) -> str:
  names = [arm.name, subset, merge.method, setting]
  if setting == 'sweep':
    point = sorted(merge.values.items())
    names += [split, ','.join(f'{name}={x:g}' for name, x in point)]
  return '/'.join(names)


def _results(
  size: Size, arm: Arm, subset: Subset, scored: Scored
) -> list[Result]:
  """Merges once, and scores what is needed of each merge."""
  experts = [
    size.folder.root / scored.experts[category]['checkpoint']
    for category in subset.categories
  ]
  for name in ('base', *(f'experts/{each}' for each in subset.categories)):
    demand_as_scored(size, arm, name)
  base = size.load(size.base(arm))
  places = jax.tree.map(lambda leaf: leaf.sharding, base)
  trials = Trials(size, subset, base, scored.expert_values('validation'))
  merges = iter(trials.wanted)  # in the order of the sweep

  def evaluate(checkpoint: Any) -> None:
    params = jax.device_put(checkpoint[stored.ROOT], places)
    trials.score(next(merges), params)

  with size.on_mesh():
    mk.sweep(
      {' '.join(merge): merge.rule() for merge in trials.wanted},
      experts,
      size.base(arm),
      evaluate,
      seed=arm.seed,
      stacked_axes=STACKED_AXES,
      mesh=size.mesh,
      memory_budget=size.config.memory_budget,
      partition_rules=sharding.PARTITION_RULES if size.mesh else None,
    )
    trials.test_chosen()
  if size.config.strict and is_everything(size, subset):
    # On one device, whatever the mesh of the streamed merges.
    in_memory.demand_same(
      {
        method: (merge.rule(), params)
        for method, (_, merge, params) in trials.chosen.items()
      },
      [stored.load(path, size.shape) for path in experts],
      stored.load(size.base(arm), size.shape),
      arm.seed,
    )
  return trials.results()


def _fingerprints(scored: Scored, subset: Subset) -> dict[str, Any]:
  """Fingerprints of what is merged, as cells have them."""
  return {
    'base': scored.base['fingerprint'],
    'experts': {
      category: scored.experts[category]['fingerprint']
      for category in subset.categories
    },
  }


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
