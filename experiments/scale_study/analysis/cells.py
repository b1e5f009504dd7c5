"""What the grid writes and the analysis reads: one merge a line.

`cells.jsonl` holds a `Cell` a line, `gates.json` a list of `Gate`s. A *task* is
called `category`, or `category/data set` where a category is scored on several
data sets; scores are mappings from tasks.
"""

from collections.abc import Iterable, Mapping, Sequence
import dataclasses
import functools
import json
from pathlib import Path
import statistics
from typing import Any, Literal

from experiments.scale_study.analysis import bases, methods
from experiments.scale_study.analysis.bases import Base
from experiments.scale_study.analysis.records import from_json, type_problems

Setting = Literal['validated', 'fixed', 'sweep']
Split = Literal['test', 'validation']
Scores = Mapping[str, float]

BASES = tuple(bases.BASES)
METHODS = tuple(methods.METHODS)

# The category of a gate that concerns all categories of its split.
ALL = 'all'


@dataclasses.dataclass(frozen=True, kw_only=True)
class Cell:
  """One merge and its scores.

  Attributes:
    size: name of the model size.
    parameters: number of parameters of that size.
    base: the base the experts were fine-tuned from.
    method: the merge method, one of `METHODS`.
    n: number of experts merged.
    subset: categories of the experts merged, in order.
    subset_number: which of the subsets of this `n` and `seed` it is.
    seed: of everything random: base, experts, subsets, merge.
    setting: hyperparameters chosen on validation data, the same for all
      merges, or one point of a sweep.
    split: the examples that `scores`, `expert` and the others are of.
    hyperparameters: of the method, by name; empty if it has none.
    checkpoints: fingerprints, {'base': one, 'experts': {category: one}}.
    command: runs this merge again.
    drift: norm of merged − base over norm of base.
    loss: of the merge, mean over the held-in tasks of the experts merged.
    losses: of the merge, by held-in task that was scored, whether its expert
      was merged or not; empty in results made before these were kept.
    scores: of the merge, by task.
    expert: score of the task's own expert, at least for the experts merged.
    base_scores: of the base, by task.
    multitask: of the multitask model, by task; empty if there is none.
    held_in: tasks that experts were trained on.
    held_out: tasks that none was trained on.
  """

  size: str
  parameters: int
  base: Base
  method: str
  n: int
  subset: tuple[str, ...]
  subset_number: int
  seed: int
  setting: Setting
  hyperparameters: Mapping[str, Any]
  checkpoints: Mapping[str, Any]
  command: str
  drift: float
  loss: float
  scores: Scores
  expert: Scores
  base_scores: Scores
  multitask: Scores
  held_in: tuple[str, ...]
  held_out: tuple[str, ...]
  split: Split = 'test'
  losses: Scores = dataclasses.field(default_factory=dict)

  @functools.cached_property
  def merged_tasks(self) -> tuple[str, ...]:
    """The held-in tasks of the experts merged."""
    return tuple(task for task in self.held_in if category(task) in self.subset)

  @property
  def identity(self) -> tuple:
    """What no two cells may share."""
    merge = (self.size, self.base, self.method, tuple(sorted(self.subset)))
    if self.setting == 'sweep':
      point = json.dumps(dict(self.hyperparameters), sort_keys=True)
      return (*merge, self.seed, self.setting, self.split, point)
    return (*merge, self.seed, self.setting)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
  """A condition that was checked before anything was merged.

  Attributes:
    size: name of the model size.
    base: the base that was checked.
    category: the category that was checked, or `ALL` those of its split.
    split: whether the category is held-in or held-out.
    score: what was reached.
    chance: what guessing reaches, or None where that means nothing.
    passed: whether it was enough; `pass` in the file.
    gate: the condition in words.
    seed: of the run that was checked.
  """

  size: str
  base: Base
  category: str
  split: Literal['held-in', 'held-out']
  score: float
  chance: float | None
  passed: bool
  gate: str
  seed: int


@functools.cache
def category(task: str) -> str:
  """Returns the category of a task."""
  return task.partition('/')[0]


def category_scores(scores: Scores, tasks: Iterable[str]) -> dict[str, float]:
  """Returns the mean score of each category over its tasks that have one."""
  groups: dict[str, list[float]] = {}
  for task in tasks:
    if task in scores:
      groups.setdefault(category(task), []).append(scores[task])
  return {name: statistics.fmean(group) for name, group in groups.items()}


def load(path: Path) -> tuple[Cell, ...]:
  """Reads and validates a `cells.jsonl`.

  Args:
    path: of the file.

  Returns:
    The cells in the order of the file.

  Raises:
    ValueError: a line is not a valid cell, two cells are the same merge, or
      sizes and parameters do not go together; the message names the lines.
  """
  cells, lines = [], {}
  for number, line in enumerate(path.read_text('utf-8').splitlines(), 1):
    try:
      cell = from_json(Cell, json.loads(line))
      _refuse(_problems(cell))
    except ValueError as error:
      raise ValueError(f'{path}, line {number}: {error}') from error
    first = lines.setdefault(cell.identity, number)
    if first != number:
      raise ValueError(
        f'{path}: lines {first} and {number} are the same merge: '
        f'{cell.identity}. Remove one of them.'
      )
    cells.append(cell)
  if not cells:
    raise ValueError(f'{path} holds no cell. Run the grid first.')
  parameters: dict[str, set[int]] = {}
  for cell in cells:
    parameters.setdefault(cell.size, set()).add(cell.parameters)
  for size, counts in parameters.items():
    if len(counts) > 1:
      raise ValueError(
        f'{path}: size {size!r} has {sorted(counts)} parameters; one size is '
        'one number of parameters.'
      )
  return tuple(cells)


def load_gates(path: Path) -> tuple[Gate, ...]:
  """Reads and validates a `gates.json`.

  Args:
    path: of the file.

  Returns:
    The gates in the order of the file.

  Raises:
    ValueError: an entry is not a valid gate.
  """
  gates = []
  for number, entry in enumerate(json.loads(path.read_text('utf-8'))):
    try:
      entry = dict(entry)
      entry['passed'] = entry.pop('pass', None)
      gates.append(from_json(Gate, entry))
    except ValueError as error:
      raise ValueError(f'{path}, entry {number}: {error}') from error
  return tuple(gates)


def validate(cell: Cell) -> None:
  """Checks that a cell can be analysed.

  Args:
    cell: what to check.

  Raises:
    ValueError: it cannot; the message names every reason.
  """
  _refuse(type_problems(cell) or _problems(cell))


def _refuse(problems: list[str]) -> None:
  if problems:
    raise ValueError('not a valid cell: ' + '; '.join(problems) + '.')


def _problems(cell: Cell) -> list[str]:
  """Names what is wrong with a cell whose types are right."""
  tasks = (*cell.held_in, *cell.held_out)
  return [
    *_merge_problems(cell),
    *_missing('scores', cell.scores, tasks),
    *_missing('base_scores', cell.base_scores, tasks),
    *_missing('expert', cell.expert, cell.merged_tasks),
    *_missing('multitask', cell.multitask, tasks if cell.multitask else ()),
  ]


def _merge_problems(cell: Cell) -> Iterable[str]:
  if cell.method not in METHODS:
    yield f'method is {cell.method!r}, not one of {", ".join(METHODS)}'
  if len(set(cell.subset)) != cell.n:
    yield f'n is {cell.n}, but subset is {list(cell.subset)}'
  unknown = set(cell.subset) - set(map(category, cell.held_in))
  if unknown:
    yield f'subset names {sorted(unknown)}, which held_in does not'
  experts = cell.checkpoints.get('experts')
  if 'base' not in cell.checkpoints or not isinstance(experts, Mapping):
    yield "checkpoints must be {'base': ..., 'experts': {category: ...}}"
  elif set(experts) != set(cell.subset):
    yield f'checkpoints are of experts {sorted(experts)}, not of the subset'
  if cell.parameters < 1 or cell.drift < 0:
    yield 'parameters must be positive, drift must not be negative'


def _missing(name: str, scores: Scores, tasks: Sequence[str]) -> Iterable[str]:
  missing = [task for task in tasks if task not in scores]
  if missing:
    yield f'{name} lacks {missing}'
