"""Where a study keeps what, and files that are there whole or not at all."""

from collections.abc import Iterator
import contextlib
import fcntl
import json
import os
from pathlib import Path
import time
from typing import Any, NamedTuple

import jax
from jax.experimental import multihost_utils

from experiments import environment
from experiments.scale_study import study_config
from experiments.scale_study.study_config import StudyConfig


class Arm(NamedTuple):
  """One set of experts: a size, a base and a seed."""

  size: str
  base: str
  seed: int

  @property
  def name(self) -> str:
    """Of its folders."""
    return f'{self.size}/{self.base}/{self.seed}'


class Folder:
  """The results of a study.

  models/, scores/ and cells/ hold what each arm left, in a folder of its name;
  cells.jsonl, gates.json and the report are made of them in the end.
  """

  def __init__(self, root: Path, config: StudyConfig, digest: str):
    """Opens or begins a folder; one may gain seeds and sizes.

    While it holds nothing but its configuration, that may change.

    Args:
      root: of the results.
      config: the preset.
      digest: of the questions that models are scored on, as `loading.digest`
        returns it.

    Raises:
      ValueError: if it was begun with another preset or other questions.
    """
    self.root = root.absolute()
    record = root / 'config.json'
    made = ('models', 'scores', 'cells', 'cells.jsonl')
    is_begun = any((root / name).exists() for name in made)
    recorded = read_json(record) if is_begun and record.exists() else {}
    # Older folders do not say what was asked; they do from now on.
    is_said = 'questions' in recorded
    asked = recorded.pop('questions', digest)
    problems = study_config.differences(config, recorded) if recorded else {}
    if problems and not study_config.only_gained(config, recorded):
      remedy = 'Give another --output_dir, or remove it.'
      if problems.keys() == {'seeds'}:
        both = dict.fromkeys([*recorded['seeds'], *config.seeds])
        remedy = f'Take --set=seeds={",".join(map(str, both))}.'
      elif problems.keys() <= study_config.OF_MERGES:
        remedy += (
          ' As only the merges differ, a copy of its models/ and scores/ '
          'in the new one saves all training.'
        )
      raise ValueError(
        f'{root} holds results of another configuration: '
        f'{"; ".join(problems.values())}. {remedy}'
      )
    if asked != digest:
      raise ValueError(
        f'{root} holds scores on other questions: the validation or test data, '
        'or the vocabulary that is made of the training data, have changed '
        f'since it was begun (their digest was {asked} and is {digest}). Bring '
        'back the data of then; or give another '
        '--output_dir, in which a copy of its models/ saves all training if '
        'the training data are the same.'
      )
    # Hosts that come later find it, so that none may be waited for.
    if (problems or not is_said) and jax.process_index() == 0:
      written = {**study_config.as_json(config), 'questions': digest}
      _replace(record, _json(written))

  def model(self, arm: Arm, name: str) -> Path:
    """Checkpoint of a model of an arm."""
    return self.root / 'models' / arm.name / name

  def score(self, arm: Arm, name: str) -> Path:
    """What a model of an arm scored."""
    return self.root / 'scores' / arm.name / f'{name}.json'

  def cells(self, arm: Arm, subset: str) -> Path:
    """The merges of a subset of experts."""
    return self.root / 'cells' / arm.name / f'{subset}.jsonl'

  @property
  def collected(self) -> Path:
    """The merges of all subsets, for the report."""
    return self.root / 'cells.jsonl'

  @contextlib.contextmanager
  def lock(self, part: str) -> Iterator[None]:
    """Waits until no other run works on a part of the study."""
    with contextlib.ExitStack() as held:
      if jax.process_index() == 0:
        path = self.root / 'logs' / f'{part.replace("/", "-")}.lock'
        path.parent.mkdir(parents=True, exist_ok=True)
        file = held.enter_context(path.open('w'))
        fcntl.flock(file, fcntl.LOCK_EX)
      # All hosts look at what is done only now, and so see the same.
      if jax.process_count() > 1:
        multihost_utils.sync_global_devices(f'lock of {part}')
      yield

  @contextlib.contextmanager
  def timed(self, part: str, phase: str) -> Iterator[None]:
    """Notes the seconds that a phase took, of CPU and on the wall, and where.

    The same bits come out only of the same code on the same machine.
    """
    cpu, wall = time.process_time(), time.perf_counter()
    yield
    if jax.process_index() > 0:
      return
    line = {
      'part': part,
      'phase': phase,
      'cpu': round(time.process_time() - cpu, 1),
      'wall': round(time.perf_counter() - wall, 1),
      'commit': environment.commit(),
      **environment.machine(),
    }
    with (self.root / 'seconds.jsonl').open('a') as file:
      file.write(json.dumps(line) + '\n')


def write_text(path: Path, text: str) -> None:
  """Writes a file at once, on the first host: it is there whole or not at all.

  Other hosts go on when it is there.
  """
  if jax.process_index() == 0:
    _replace(path, text)
  if jax.process_count() > 1:
    multihost_utils.sync_global_devices(str(path))


def _replace(path: Path, text: str) -> None:
  path.parent.mkdir(parents=True, exist_ok=True)
  part = path.with_name(f'{path.name}.{os.getpid()}')
  with part.open('w', encoding='utf-8') as file:
    file.write(text)
    file.flush()
    # Else the name may outlive a crash of the machine without the text.
    os.fsync(file.fileno())
  part.replace(path)


def write_json(path: Path, record: Any) -> None:
  """Writes a JSON file at once."""
  write_text(path, _json(record))


def _json(record: Any) -> str:
  return json.dumps(record, indent=1) + '\n'


def read_json(path: Path) -> Any:
  """Reads a JSON file."""
  return json.loads(path.read_text(encoding='utf-8'))
