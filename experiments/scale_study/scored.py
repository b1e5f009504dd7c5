"""What the models of an arm score, before anything is merged."""

from collections.abc import Sequence
from pathlib import Path
import statistics
from typing import Any

from experiments.scale_study import progress, stored
from experiments.scale_study.examination import Score
from experiments.scale_study.folder import Arm, read_json, write_json
from experiments.scale_study.size import demand, Size
from mergekit_jax import processes


def evaluate(size: Size, arm: Arm) -> None:
  """Scores all models of an arm and keeps the best rate of each expert."""
  # The paths of each model to choose from, and the categories it is scored on.
  models: dict[str, tuple[Sequence[Path], Sequence[str] | None]] = {
    'base': ([size.base(arm)], None),
    'multitask': ([size.folder.model(arm, 'multitask')], None),
  }
  for category in size.source.held_in:
    paths = [
      size.expert(arm, category, rate) for rate in size.config.expert_rates
    ]
    models[f'experts/{category}'] = paths, [category]
  for category in size.direct:
    path = size.folder.model(arm, f'direct/{category}')
    models[f'direct/{category}'] = [path], [category]
  with progress.bar(len(models), f'{arm.name}/evaluate', 'model') as scored:
    for name, (paths, categories) in models.items():
      _score(size, arm, name, paths, categories)
      scored.update()


def _mean_value(scores: dict[str, Score]) -> float:
  """Mean over tasks."""
  return statistics.fmean(score.value for score in scores.values())


def _score(
  size: Size,
  arm: Arm,
  name: str,
  paths: Sequence[Path],
  categories: Sequence[str] | None = None,
) -> None:
  """Scores the model that is best on validation data."""
  record = size.folder.score(arm, name)
  if record.exists():
    demand_as_scored(size, arm, name)
    return
  kind, *_ = name.split('/')
  for path in paths:
    size.demand_trained(arm, kind, path)
  exam, found = size.examination, []
  with size.on_mesh():
    for path in paths:
      params = size.load(path)
      found.append((exam.scores(params, 'validation', categories), path))
    validation, path = max(
      found, key=lambda pair: _mean_value(pair[0]) if len(paths) > 1 else 0
    )
    params = size.load(path)
    test = exam.scores(params, 'test', categories)
    write_json(
      record,
      {
        'checkpoint': str(path.relative_to(size.folder.root)),
        'fingerprint': stored.fingerprint(params),
        'files': stored.files(path),
        'validation': validation,
        'test': test,
        'rouge_l': exam.written(params, categories),
      },
    )


def demand_as_scored(size: Size, arm: Arm, name: str) -> None:
  """Demands that a model is the one that was scored.

  Its parameters are read only if its files are others than then, as those of a
  copy are, and once.

  Raises:
    ValueError: if it was trained anew.
  """
  path = size.folder.score(arm, name)
  record = read_json(path)
  checkpoint = size.folder.root / record['checkpoint']
  files = stored.files(checkpoint)
  # Records of older studies do not say which files.
  if not processes.first_told('others' * (files != record.get('files'))):
    return
  if stored.fingerprint(size.load(checkpoint)) != record['fingerprint']:
    raise ValueError(
      f'{checkpoint} is not the model that was scored. Remove '
      f'scores/{arm.name} and cells/{arm.name}, and do --phase=evaluate again.'
    )
  write_json(path, {**record, 'files': files})


class Scored:
  """What the models of an arm scored.

  Attributes:
    base: record of the base.
    multitask: record of the multitask model.
    experts: records of the experts by category.
    direct: records of the models of held-out categories, by category.
  """

  def __init__(self, size: Size, arm: Arm):
    """Reads the records, which `evaluate` wrote.

    Raises:
      ValueError: if it did not.
    """

    def read(name: str) -> Any:
      demand(size.folder.score(arm, name), 'evaluate')
      return read_json(size.folder.score(arm, name))

    self.base, self.multitask = read('base'), read('multitask')
    held_in = size.source.held_in
    self.experts = {name: read(f'experts/{name}') for name in held_in}
    self.direct = {name: read(f'direct/{name}') for name in size.direct}

  def expert_values(self, split: str) -> dict[str, float]:
    """Score of each held-in task's own expert."""
    return {
      task: value
      for record in self.experts.values()
      for task, value in values(record, split).items()
    }


def values(record: Any, split: str) -> dict[str, float]:
  """Scores by task, without the losses."""
  return {task: value for task, (value, _) in record[split].items()}
