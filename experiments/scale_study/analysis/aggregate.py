"""The merges of a study as arrays, and which categories may be counted.

A category whose gate failed for a size and base is *not testable* there: it is
left out of every mean, with the reason kept for the report. What compares sizes
or bases counts the categories that are testable in all of them: see
`Grid.alike`.
"""

from collections.abc import Iterable, Mapping
import dataclasses
import functools
from pathlib import Path
from typing import NamedTuple

import numpy as np

from experiments.scale_study.analysis import cells as cells_module
from experiments.scale_study.analysis.bootstrap import (
  Estimate,
  estimate,
  mean,
  Statistic,
)
from experiments.scale_study.analysis.cells import (
  ALL,
  BASES,
  category,
  category_scores,
  Cell,
  Gate,
  METHODS,
)
from experiments.scale_study.analysis.measures import (
  Categories,
  guessing,
  Measure,
)

# The axes of an array of values; without the first two, of an array of means.
SEED, SUBSET, SIZE, BASE, METHOD, N = range(6)

# By size and base.
Countable = Mapping[tuple[str, str], Categories]

# What the paper merges at least. A single expert is there for the law alone.
FEWEST_MERGED = 2


class Exclusion(NamedTuple):
  """A category that may not be counted, and why."""

  size: str
  base: str
  category: str
  reason: str


def without_gain(cell: Cell) -> dict[str, str]:
  """Returns the categories in which a merge has nothing to keep, and why."""
  held_in, held_out = cell.merged_tasks, cell.held_out
  expert = category_scores(cell.expert, held_in)
  base = category_scores(cell.base_scores, (*held_in, *held_out))
  return {
    name: 'an expert has no gain to keep over its base'
    for name, score in expert.items()
    if score <= base[name]
  } | {
    name: 'the base scores 0: nothing to divide by'
    for name in map(category, held_out)
    if base[name] <= 0
  }


@dataclasses.dataclass(frozen=True)
class Results:
  """Everything that was run.

  Attributes:
    cells: every merge.
    gates: what was checked before.
  """

  cells: tuple[Cell, ...]
  gates: tuple[Gate, ...]

  @classmethod
  def load(cls, folder: Path) -> 'Results':
    """Reads `cells.jsonl` and `gates.json` of a folder."""
    return cls(
      cells_module.load(folder / 'cells.jsonl'),
      cells_module.load_gates(folder / 'gates.json'),
    )

  @functools.cached_property
  def sizes(self) -> dict[str, int]:
    """Parameters by name of the size, in ascending order."""
    sizes = {cell.size: cell.parameters for cell in self.cells}
    return dict(sorted(sizes.items(), key=lambda item: item[1]))

  @functools.cached_property
  def seeds(self) -> tuple[int, ...]:
    """Seeds of any merge."""
    return tuple(sorted({cell.seed for cell in self.cells}))

  @functools.cached_property
  def exclusions(self) -> tuple[Exclusion, ...]:
    """What may not be counted."""
    return tuple(
      Exclusion(*arm, name, '; '.join(dict.fromkeys(reasons)))
      for arm, names in self._categories.items()
      for name in names
      if (reasons := [*self._failures(arm, name)])
    )

  @functools.cached_property
  def with_ratio(self) -> Countable:
    """The categories that have a ratio, by size and base, gates or not."""
    without = {
      (cell.size, cell.base, name)
      for cell in self.cells
      if cell.split == 'test' and cell.n >= FEWEST_MERGED
      for tasks, below in (
        (cell.merged_tasks, cell.expert),
        (cell.held_out, cell.base_scores),
      )
      for name, score in category_scores(below, tasks).items()
      if score <= 0
    }
    return {
      arm: frozenset(name for name in names if (*arm, name) not in without)
      for arm, names in self._categories.items()
    }

  @functools.cached_property
  def countable(self) -> Countable:
    """The categories that may be counted, by size and base."""
    excluded = {exclusion[:3] for exclusion in self.exclusions}
    return {
      arm: frozenset(name for name in names if (*arm, name) not in excluded)
      for arm, names in self._categories.items()
    }

  def is_better_base(self, size: str) -> bool:
    """Whether no gate says that instruction tuning made no better base."""
    return all(
      gate.passed
      for gate in self.gates
      if (gate.size, gate.category, gate.split) == (size, ALL, 'held-in')
    )

  def chance(self) -> dict[str, float]:
    """Returns the score of guessing, by category."""
    return {
      gate.category: gate.chance
      for gate in self.gates
      if gate.chance is not None
    }

  def guessing(self) -> tuple[Measure, Measure]:
    """Returns the held-in and held-out measures of a model that guesses."""
    return guessing(self.chance())

  def grid(
    self,
    setting: str = 'validated',
    smallest_n: int = FEWEST_MERGED,
    gated: bool = True,
  ) -> 'Grid':
    """Lays out the merges of a setting.

    Methods without hyperparameters belong to every setting.

    Args:
      setting: 'validated' or 'fixed'.
      smallest_n: leaves out merges of fewer experts.
      gated: whether only categories count whose gates passed.
    """
    chosen = {}
    for cell in self.cells:
      if cell.n < smallest_n:
        continue
      plain = not cell.hyperparameters and cell.setting != 'sweep'
      if cell.setting == setting:
        chosen[cell.identity[:-1]] = cell
      elif plain:
        chosen.setdefault(cell.identity[:-1], cell)
    countable = self.countable if gated else self.with_ratio
    return Grid.of(chosen.values(), self, countable)

  @functools.cached_property
  def _categories(self) -> dict[tuple[str, str], list[str]]:
    arms: dict[tuple[str, str], dict[str, None]] = {}
    for size in self.sizes:
      for base in BASES:
        for cell in self.cells:
          if (cell.size, cell.base) == (size, base):
            names = map(category, (*cell.held_in, *cell.held_out))
            arms.setdefault((size, base), {}).update(dict.fromkeys(names))
    return {arm: list(names) for arm, names in arms.items()}

  @functools.cached_property
  def _without_gain(
    self,
  ) -> dict[tuple[str, str], list[tuple[Categories, dict[str, str]]]]:
    """Held-out categories of each merge, and its reasons, by size and base."""
    arms = {arm: [] for arm in self._categories}
    for cell in self.cells:
      # What is scored on few examples to choose by must not decide this.
      if cell.n >= FEWEST_MERGED and cell.split == 'test':
        held_out = frozenset(map(category, cell.held_out))
        arms[cell.size, cell.base].append((held_out, without_gain(cell)))
    return arms

  def _failures(self, arm: tuple[str, str], name: str) -> Iterable[str]:
    cells = self._without_gain[arm]
    held_out = any(name in names for names, _ in cells)
    split = 'held-out' if held_out else 'held-in'
    gates = [
      gate
      for gate in self.gates
      if (gate.size, gate.base, gate.split, gate.category)
      == (*arm, split, name)
    ]
    if not gates:
      yield 'no gate was recorded'
    for gate in gates:
      if not gate.passed:
        yield (
          f'failed: {gate.gate} (score {gate.score:.2f}, seed {gate.seed})'
        )
    for _, reasons in cells:
      if name in reasons:
        yield reasons[name]


@dataclasses.dataclass(frozen=True)
class Grid:
  """The merges of one setting along axes.

  Attributes:
    results: what they are part of.
    seeds: along the first axis.
    sizes: names, from small to large.
    bases: along the fourth axis.
    methods: along the fifth.
    ns: numbers of experts, ascending.
    cells: by index [seed, subset, size, base, method, n]; the subset is
      numbered within its seed and n, by its categories.
    countable: the categories that count, by size and base.
  """

  results: Results
  seeds: tuple[int, ...]
  sizes: tuple[str, ...]
  bases: tuple[str, ...]
  methods: tuple[str, ...]
  ns: tuple[int, ...]
  cells: Mapping[tuple[int, ...], Cell]
  countable: Countable

  @classmethod
  def of(
    cls,
    cells: Iterable[Cell],
    results: Results,
    countable: Countable,
  ) -> 'Grid':
    """Orders merges that are all of one setting."""
    cells = list(cells)
    subsets: dict[tuple[int, int], dict[tuple[str, ...], int]] = {}
    for cell in sorted(cells, key=lambda cell: cell.subset_number):
      numbers = subsets.setdefault((cell.seed, cell.n), {})
      numbers.setdefault(tuple(sorted(cell.subset)), len(numbers))
    axes = {
      'seeds': tuple(sorted({cell.seed for cell in cells})),
      'sizes': tuple(s for s in results.sizes if s in {c.size for c in cells}),
      'bases': tuple(b for b in BASES if b in {c.base for c in cells}),
      'methods': tuple(m for m in METHODS if m in {c.method for c in cells}),
      'ns': tuple(sorted({cell.n for cell in cells})),
    }
    placed = {
      (
        axes['seeds'].index(cell.seed),
        subsets[cell.seed, cell.n][tuple(sorted(cell.subset))],
        axes['sizes'].index(cell.size),
        axes['bases'].index(cell.base),
        axes['methods'].index(cell.method),
        axes['ns'].index(cell.n),
      ): cell
      for cell in cells
    }
    return cls(results, **axes, cells=placed, countable=countable)

  def alike(self, *axes: int) -> 'Grid':
    """The same merges, of which only what can be compared counts.

    Otherwise a size or base that fails an easy category would change the mean
    of all the others.

    Args:
      *axes: SIZE, BASE or both; categories have to be countable all along.
    """
    kept = [i for i, axis in enumerate((SIZE, BASE)) if axis not in axes]
    countable = {
      arm: frozenset.intersection(
        *(
          names
          for other, names in self.countable.items()
          if all(other[i] == arm[i] for i in kept)
        )
      )
      for arm in self.countable
    }
    return dataclasses.replace(self, countable=countable)

  @property
  def has_held_out(self) -> bool:
    """Whether any merge was scored on held-out tasks."""
    return any(cell.held_out for cell in self.cells.values())

  @property
  def doublings(self) -> np.ndarray:
    """log2 of the parameters, [sizes]."""
    return np.log2([self.results.sizes[size] for size in self.sizes])

  def values(self, measure: Measure) -> np.ndarray:
    """Measures every merge.

    Args:
      measure: of one merge.

    Returns:
      [seeds, subsets, sizes, bases, methods, n], NaN where there is no merge.
    """
    subsets = 1 + max((index[SUBSET] for index in self.cells), default=0)
    lengths = map(len, (self.sizes, self.bases, self.methods, self.ns))
    values = np.full((len(self.seeds), subsets, *lengths), np.nan)
    for index, cell in self.cells.items():
      values[index] = measure(cell, self.countable[cell.size, cell.base])
    return values

  def means(self, measure: Measure) -> np.ndarray:
    """Averages over subsets, then seeds: [sizes, bases, methods, n]."""
    return mean(mean(self.values(measure), axis=1), axis=0)

  def estimate(
    self, measure: Measure, statistic: Statistic = lambda means: means
  ) -> Estimate:
    """Estimates a statistic of the means, [sizes, bases, methods, n]."""
    return estimate(self.values(measure), statistic)
