"""What a run of the study found, and whether it may be believed."""

from collections.abc import Mapping
import dataclasses

from experiments.scale_study.config import StudyConfig

# Accuracy by task.
Scores = Mapping[str, float]

# An expert that gains less than this over its base has nothing to merge.
REQUIRED_GAIN = 0.2


@dataclasses.dataclass(frozen=True)
class Results:
  """Accuracies on the test examples, between 0 and 1.

  Attributes:
    config: what was run.
    chance: accuracy of guessing uniformly.
    base: accuracy of the base.
    experts: accuracies of each expert, by the task it was trained on.
    merges: accuracies of each merge, by method.
    unequal_leaves: by method, paths at which the streamed merge differs from
      the merge in memory.
    seconds: wall time by stage.
  """

  config: StudyConfig
  chance: Scores
  base: Scores
  experts: Mapping[str, Scores]
  merges: Mapping[str, Scores]
  unequal_leaves: Mapping[str, list[str]]
  seconds: Mapping[str, float]

  def rows(self) -> list[dict[str, str | float]]:
    """Returns one row per task and their mean: each expert on its own task."""
    rows = []
    for task in self.experts:
      row = {
        'chance': self.chance[task],
        'base': self.base[task],
        'expert': self.experts[task][task],
      }
      row |= {name: scores[task] for name, scores in self.merges.items()}
      rows.append({'task': task} | row)
    columns = [column for column in rows[0] if column != 'task']
    mean = {c: sum(row[c] for row in rows) / len(rows) for c in columns}
    return [*rows, {'task': 'mean'} | mean]

  def failures(self) -> list[str]:
    """Explains why the run must not be used; empty if it may."""
    failures = []
    for task, scores in self.experts.items():
      gain = round(scores[task] - self.base[task], 6)
      if gain < REQUIRED_GAIN:
        failures.append(
          f'The {task} expert gains {gain:+.3f} over the base on its own task; '
          f'at least {REQUIRED_GAIN:+.3f} is needed. Train it, or the base, '
          'for more steps.'
        )
    for method, paths in self.unequal_leaves.items():
      if paths:
        failures.append(
          f'The streamed {method} merge differs from the merge in memory at '
          f'{len(paths)} leaves: {", ".join(paths)}.'
        )
    return failures
