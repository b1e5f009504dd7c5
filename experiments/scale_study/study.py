"""The study from the first pretraining step to the report.

It has *parts*, which different processes may work on: the bases of each size
and seed, then each arm. Parts have *phases*. Whatever is stored is not done
again, so that the same command goes on after it was killed.
"""

from collections.abc import Callable, Mapping, Sequence
import dataclasses
import json
from pathlib import Path
import shlex

from absl import logging
import jax

from experiments.scale_study import (
  gates,
  grid,
  loading,
  merge_points,
  phases,
  rouge_l,
  scheduler,
  scored,
  study_config,
)
from experiments.scale_study.analysis import cells
from experiments.scale_study.analysis.report import analyse
from experiments.scale_study.folder import Arm, Folder, write_json, write_text
from experiments.scale_study.size import Size
from experiments.scale_study.study_config import StudyConfig
from mergekit_jax import checks

# What is done for the bases of a size and seed, and what for an arm.
OF_BASES = ('bases',)
OF_ARMS = ('experts', 'multitask', 'evaluate', 'merge')
PHASES = (*OF_BASES, *OF_ARMS, 'report')


class Study:
  """A preset and the folder of its results."""

  def __init__(self, config: StudyConfig, root: Path, flags: Sequence[str]):
    """Opens or begins a folder.

    Args:
      config: the preset, with what was overridden.
      root: of the results.
      flags: with which the command makes this `config` in this folder.

    Raises:
      ValueError: if the memory is no amount, a merge cannot be made, the tasks
        cannot be read, or the folder was begun with another preset or other
        questions.
    """
    self.config = config
    # A preset cannot ask this itself: it is made before JAX is imported.
    checks.size('memory_budget', config.memory_budget)
    merge_points.demand_rules(config)
    # Before the folder is begun, which then holds results of this preset only.
    self.source = loading.load_source(config)
    self.folder = Folder(root, config, loading.digest(config, self.source))
    self._flags = list(flags)
    self._sizes: dict[str, Size] = {}

  def run(self, wanted: Sequence[str] = PHASES) -> str:
    """Does the phases that are wanted and returns what there is to say."""
    parts = self.parts()
    working = {part for part in parts if {*wanted}.intersection(_phases(part))}
    parts = {
      part: [other for other in before if other in working]
      for part, before in parts.items()
      if part in working
    }
    if self.config.processes == 1:
      for part in parts:
        self.run_part(part, wanted)
    elif parts:
      scheduler.run(
        parts,
        [
          *('-m', 'experiments.scale_study', *self._flags),
          *(f'--phase={phase}' for phase in wanted),
        ],
        processes=self.config.processes,
        logs=self.folder.root / 'logs',
      )
    return self.report() if 'report' in wanted else ''

  def parts(self) -> Mapping[str, Sequence[str]]:
    """Returns the parts, and what each comes after; the largest first."""
    sizes = list(self.config.sizes)[::-1]
    made: dict[str, Sequence[str]] = {}
    for seed in self.config.seeds:
      made |= {f'{size}/{seed}': () for size in sizes}
    for seed in self.config.seeds:
      for size in sizes:
        for base in self.config.bases:
          made[Arm(size, base, seed).name] = (f'{size}/{seed}',)
    return made

  def run_part(self, part: str, wanted: Sequence[str] = PHASES) -> None:
    """Does the phases of one part, in their order.

    Raises:
      ValueError: if there is no such part, it has none of the phases, or an
        earlier phase is not done.
    """
    _demand(f'--part={part}', 'part', part, [*self.parts()])
    if not {*wanted}.intersection(_phases(part)):
      raise ValueError(
        f'--part={part} has no phase {", ".join(wanted)}: it has '
        f'{", ".join(_phases(part))}.'
        + (' The report is of all parts.' if 'report' in wanted else '')
      )
    name, *base, seed = part.split('/')
    size = self.size(name)
    todo: dict[str, Callable[[], None]] = {}
    if base:
      arm = Arm(name, base[0], int(seed))
      todo['experts'] = lambda: phases.experts(size, arm)
      todo['multitask'] = lambda: phases.multitask(size, arm)
      todo['evaluate'] = lambda: self._evaluate(size, arm)
      todo['merge'] = lambda: grid.run(size, arm, shlex.join(self._flags))
    else:
      todo['bases'] = lambda: phases.bases(size, int(seed))
    with self.folder.lock(part):
      for phase, do in todo.items():
        if phase in wanted:
          with self.folder.timed(part, phase):
            do()

  def _evaluate(self, size: Size, arm: Arm) -> None:
    """Scores what is not merged, and says what merges cannot be asked about."""
    scored.evaluate(size, arm)
    for gate in gates.check_arm(size, arm):
      if not gate.passed:
        logging.warning('%s: not testable.', gates.failure(gate))

  def size(self, name: str) -> Size:
    """Returns what the models of a size have in common."""
    if name not in self._sizes:
      self._sizes[name] = Size(self.config, self.folder, name, self.source)
    return self._sizes[name]

  def report(self) -> str:
    """Collects merges and gates, and analyses them.

    Of a study that is under way it takes the sizes and seeds that are done.

    Raises:
      ValueError: if none is.
    """
    lines, checked, rows, missing = [], [], [], []
    for name in self.config.sizes:
      size = self.size(name)
      for seed in self.config.seeds:
        arms = [Arm(name, base, seed) for base in self.config.bases]
        merged = [
          (arm, subset)
          for arm in arms
          for subset in grid.subsets_of(size, seed)
        ]
        if not all(grid.is_done(size, *one) for one in merged):
          missing.append(f'{name}/{seed}')
          continue
        checked += gates.check(size, seed)
        rows += (row for arm in arms for row in rouge_l.rows(size, arm))
        lines += (
          self.folder.cells(arm, subset.name).read_text()
          for arm, subset in merged
        )
    if not lines:
      raise ValueError(
        f'{self.folder.root}: there is nothing to report yet, since no size is '
        'merged from all bases with any seed. Run the other phases first.'
      )
    write_text(self.folder.collected, ''.join(lines))
    write_json(self.folder.root / 'gates.json', [*map(gates.as_json, checked)])
    write_text(self.folder.root / 'rouge_l.csv', rouge_l.table(rows))
    # Of all sizes alike.
    asked = self.size(next(iter(self.config.sizes))).examination.test_examples()
    write_json(self.folder.root / 'questions.json', asked)
    said = analyse(self.folder.root) if jax.process_index() == 0 else ''
    if missing:
      said += f'\nNot done yet, and in no figure: {", ".join(missing)}.'
    return said

  def failures(self) -> list[str]:
    """Names the gates that failed, of a study that `report` has collected."""
    return [
      gates.failure(gate)
      for gate in cells.load_gates(self.folder.root / 'gates.json')
      if not gate.passed
    ]

  def reproduce(self, cell: str) -> str:
    """Makes one merge again and compares it with what is stored.

    Args:
      cell: as `grid.name_of` names it.

    Returns:
      The cell as JSON, and how it compares, but for its command.

    Raises:
      ValueError: if there is no such cell, or it is not the same.
    """
    name, base, seed, subset_name, *_ = [*cell.split('/'), *4 * ['']]
    arms = [part for part in self.parts() if part.count('/') == 2]
    _demand(f'--cell={cell}', 'arm', f'{name}/{base}/{seed}', arms)
    size, arm = self.size(name), Arm(name, base, int(seed))
    drawn = {subset.name: subset for subset in grid.subsets_of(size, arm.seed)}
    _demand(f'--cell={cell}', 'subset', subset_name, [*drawn])
    subset = drawn[subset_name]
    _demand(f'--cell={cell}', 'merge', cell, grid.names(size, arm, subset))
    stored = self._stored(arm, subset_name, cell)
    for part in (f'{name}/{seed}', arm.name):
      self.run_part(part, ('bases', 'experts', 'multitask', 'evaluate'))
    (made,) = (
      one
      for one in grid.subset_cells(size, arm, subset, shlex.join(self._flags))
      if grid.name_of(one) == cell
    )
    line = json.dumps(dataclasses.asdict(made))
    if stored is None:
      return f'{line}\nNothing is stored to compare it with.'
    # Commands are of whoever made a cell; older cells lack the losses.
    ignored = {'command'} if stored.losses else {'command', 'losses'}
    ours, theirs = (
      {k: v for k, v in dataclasses.asdict(one).items() if k not in ignored}
      for one in (made, stored)
    )
    if json.loads(json.dumps(ours)) != json.loads(json.dumps(theirs)):
      raise ValueError(f'{line}\nis not what is stored: {stored}')
    return f'{line}\nThe same as stored.'

  def _stored(self, arm: Arm, subset: str, name: str) -> cells.Cell | None:
    """Finds a cell in the file of its subset, or among those collected."""
    for path in (self.folder.cells(arm, subset), self.folder.collected):
      for cell in cells.load(path) if path.exists() else ():
        if grid.name_of(cell) == name:
          return cell
    return None


def _phases(part: str) -> Sequence[str]:
  return OF_ARMS if part.count('/') == 2 else OF_BASES


def _demand(given: str, kind: str, name: str, known: Sequence[str]) -> None:
  """Raises ValueError, with the nearest name, if one is not known."""
  if name not in known:
    raise ValueError(
      f'{given}: there is no such {kind}.' + study_config.nearest(name, known)
    )
