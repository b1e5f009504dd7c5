"""What has to hold before a merge can say anything about a category."""

from collections.abc import Iterator
import dataclasses
import math
import statistics
from typing import Any

from experiments.scale_study.analysis import cells
from experiments.scale_study.analysis.cells import ALL, Gate
from experiments.scale_study.folder import Arm
from experiments.scale_study.scored import Scored, values
from experiments.scale_study.size import Size
from experiments.scale_study.study_config import INSTRUCTION_TUNED, PRETRAINED


def check(size: Size, seed: int) -> Iterator[Gate]:
  """Checks the arms of a size and a seed, all of which were scored."""
  arms = {base: Arm(size.name, base, seed) for base in size.config.bases}
  for arm in arms.values():
    yield from check_arm(size, arm)
  if {PRETRAINED, INSTRUCTION_TUNED} <= arms.keys():
    scored = {base: Scored(size, arm) for base, arm in arms.items()}
    yield from _better_base(size, seed, scored)


def check_arm(size: Size, arm: Arm) -> Iterator[Gate]:
  """Checks an arm, which was scored; of two bases see `check`."""
  models, asked = Scored(size, arm), size.config.gates
  of_tasks = size.examination.chance()
  chance = cells.category_scores(of_tasks, of_tasks)

  def gate(category: str, score: float, text: str, passed: bool):
    held_in = category in size.source.held_in
    return Gate(
      size=size.name,
      base=arm.base,  # type: ignore[arg-type]
      category=category,
      split='held-in' if held_in else 'held-out',
      score=score,
      chance=chance[category],
      passed=passed,
      gate=text,
      seed=arm.seed,
    )

  for category, record in models.experts.items():
    expert, unmerged = _mean(record, category), _mean(models.base, category)
    text = f'direct training beats chance by {asked.learnable}'
    passed = _is_above(expert, chance[category], asked.learnable)
    yield gate(category, expert, text, passed)
    text = f'the expert beats its base ({unmerged:.2f}) by '
    if asked.gain is None:
      # As if they were asked different questions: what both models find hard
      # makes their difference more certain than this.
      errors = (_error(size, of, category) for of in (record, models.base))
      least = 2 * math.hypot(*errors)
      text += f'more than two standard errors ({least:.3f})'
      passed = expert - unmerged > least
    else:
      text += f'{asked.gain}'
      passed = _is_above(expert, unmerged, asked.gain)
    yield gate(category, expert, text, passed)
  for category in size.source.held_out:
    if category in models.direct:
      score = _mean(models.direct[category], category)
      text = f'direct training beats chance by {asked.learnable}'
      passed = _is_above(score, chance[category], asked.learnable)
      yield gate(category, score, text, passed)
    score = _mean(models.multitask, category)
    text = f'the multitask model beats chance by {asked.transfer}'
    passed = _is_above(score, chance[category], asked.transfer)
    yield gate(category, score, text, passed)


def failure(gate: Gate) -> str:
  """Says of a gate that failed what did not hold."""
  chance = '' if gate.chance is None else f' where chance is {gate.chance:.2f}'
  return (
    f'{gate.category}, size {gate.size}, {gate.base} base, seed {gate.seed}: '
    f'{gate.gate} did not hold, with a score of {gate.score:.2f}{chance}'
  )


def _better_base(size: Size, seed: int, scored: Any) -> Iterator[Gate]:
  for split, categories in (
    ('held-in', size.source.held_in),
    ('held-out', size.source.held_out),
  ):
    if not categories:
      continue
    before, after = (
      statistics.fmean(_mean(scored[base].base, name) for name in categories)
      for base in (PRETRAINED, INSTRUCTION_TUNED)
    )
    yield Gate(
      size=size.name,
      base=INSTRUCTION_TUNED,
      category=ALL,
      split=split,  # type: ignore[arg-type]
      score=after,
      chance=None,
      passed=after > before,
      gate=f'the instruction-tuned base beats the pretrained ({before:.2f})',
      seed=seed,
    )


def as_json(gate: Gate) -> dict[str, Any]:
  """Returns an entry of gates.json."""
  entry = dataclasses.asdict(gate)
  entry['pass'] = entry.pop('passed')
  return entry


def _error(size: Size, record: Any, category: str) -> float:
  """Standard error of the mean score of a category over its questions.

  Scores from 0 to 1 with the mean m have a variance of m (1 − m) at most, which
  right and wrong answers have.
  """
  examples = size.examination.test_examples()
  errors = [
    math.sqrt(score * (1 - score) / examples[task])
    for task, score in values(record, 'test').items()
    if cells.category(task) == category
  ]
  return math.hypot(*errors) / len(errors)


def _is_above(score: float, other: float, least: float) -> bool:
  # 1 − 0.8 is a little less than 0.2.
  return score - other >= least - 1e-9


def _mean(record: Any, category: str) -> float:
  scores = values(record, 'test')
  return cells.category_scores(scores, scores)[category]
