"""The study as a whole: its files, its reads, and what a kill leaves."""

import collections
import csv
import dataclasses
import itertools
import json
import os
import shutil
import subprocess
import sys

import jax
import numpy as np
import pytest

from experiments.scale_study import (
  folder,
  gates,
  grid,
  phases,
  stored,
  study_config,
  train,
)
from experiments.scale_study.analysis import cells
from experiments.scale_study.folder import Arm, Folder
from experiments.scale_study.model import STACKED_AXES
from experiments.scale_study.scored import (
  demand_as_scored,
  evaluate,
  Scored,
)
from experiments.scale_study.size import Size
from experiments.scale_study.study import Study
from experiments.scale_study.study_config import MethodGrid, Scratch
import mergekit_jax as mk
from mergekit_jax.checkpoint import source
from tests.experiments import small_study

pytestmark = pytest.mark.usefixtures('blank_pictures')
ARM = small_study.ARM
DIGEST = 16 * '0'


@pytest.fixture
def trained(monkeypatch):
  """Counts the chunks of steps by what they train."""
  counted = collections.Counter()
  real = train.train_chunk

  def spy(*args):
    counted['chunks'] += 1
    return real(*args)

  monkeypatch.setattr(train, 'train_chunk', spy)
  return counted


@pytest.fixture
def copied(undisturbed, tmp_path):
  """The study in a folder of its own, to be changed."""
  shutil.copytree(undisturbed.folder.root, tmp_path, dirs_exist_ok=True)
  return small_study.study(tmp_path, undisturbed.config.tasks)


@pytest.fixture
def with_own_tasks(undisturbed, tmp_path):
  """The study and its tasks in folders of their own, to be changed."""
  shutil.copytree(undisturbed.folder.root, tmp_path / 'results')
  tasks = shutil.copytree(undisturbed.config.tasks, tmp_path / 'tasks')
  record = tmp_path / 'results' / 'config.json'
  text = record.read_text().replace(undisturbed.config.tasks, str(tasks))
  record.write_text(text)
  return lambda: small_study.study(tmp_path / 'results', tasks)


def test_the_analysis_reads_what_a_study_writes(undisturbed):
  root = undisturbed.folder.root
  made = cells.load(root / 'cells.jsonl')
  by_setting = collections.Counter(
    (cell.base, cell.method, cell.setting, cell.split) for cell in made
  )
  for base in cells.BASES:
    for method in ('average', 'ties'):
      assert by_setting[base, method, 'validated', 'test'] == 1
      assert by_setting[base, method, 'fixed', 'test'] == 1
    assert by_setting[base, 'ties', 'sweep', 'test'] == 2
    assert by_setting[base, 'ties', 'sweep', 'validation'] == 2
  assert len(made) == 16
  gates = cells.load_gates(root / 'gates.json')
  # Of a base: two for each of two experts, and two for the held-out category.
  assert len(gates) == 2 * 6 + 2
  assert 'mean held-in, N = 2' in undisturbed.said
  assert (root / 'report.html').stat().st_size > 10_000
  seconds = (root / 'seconds.jsonl').read_text().splitlines()
  noted = [*map(json.loads, seconds)]
  assert {line['phase'] for line in noted} >= {'bases', 'merge'}
  # What a number that does not come out again may depend on.
  assert all(
    line['commit'] and line['jax'] == jax.__version__ for line in noted
  )


def test_scores_are_parts_of_the_questions_that_are_noted(undisturbed):
  root = undisturbed.folder.root
  questions = json.loads((root / 'questions.json').read_text())
  tasks = set()
  for cell in cells.load(root / 'cells.jsonl'):
    if cell.split == 'test':
      tasks |= {*cell.held_in, *cell.held_out}
      for task in (*cell.held_in, *cell.held_out):
        right = cell.scores[task] * questions[task]
        assert right == pytest.approx(round(right), abs=1e-6)
  assert questions.keys() == tasks


def test_what_is_written_has_rouge_l_beside_exact_match(undisturbed):
  with (undisturbed.folder.root / 'rouge_l.csv').open(newline='') as file:
    rows = list(csv.DictReader(file))
  models = ['base', 'multitask', 'expert', 'average', 'ties']
  assert [row['model'] for row in rows] == 2 * models
  assert {row['task'] for row in rows} == {
    'structure_to_text/structure_to_text_in_colours'
  }
  for row in rows:
    # Whoever writes an answer word for word has all of its words.
    assert 0 <= float(row['score']) <= float(row['rouge_l']) <= 1
  assert any(float(row['rouge_l']) > 0 for row in rows)


def test_scores_are_of_the_models_that_are_stored(undisturbed):
  size = undisturbed.size('xs')
  record = Scored(size, ARM).experts['sentiment']
  params = size.load(undisturbed.folder.root / record['checkpoint'])
  assert stored.fingerprint(params) == record['fingerprint']
  again = size.examination.scores(params, 'test', ['sentiment'])
  assert {task: list(score) for task, score in again.items()} == record['test']


def test_nothing_is_done_twice(copied, trained, monkeypatch):
  monkeypatch.delattr(grid, 'subset_cells')
  assert copied.run()
  assert not trained


@pytest.mark.parametrize('kept', ['', 'all but one line', 'half of a line'])
def test_a_subset_that_is_not_whole_is_merged_again(
  copied, trained, monkeypatch, kept
):
  path = copied.folder.cells(ARM, '2.0')
  whole, made = path.read_text(), cells.load(path)
  first, second, *_ = whole.splitlines(keepends=True)
  path.write_text(
    {
      'all but one line': whole.replace(second, ''),
      'half of a line': first + second[:99],
    }.get(kept, kept)
  )
  with pytest.raises(ValueError, match='nothing to report yet'):
    copied.report()
  monkeypatch.setattr(grid, 'subset_cells', lambda *_: made)
  copied.run_part(ARM.name, ['merge'])
  assert path.read_text() == whole
  assert not trained


def test_a_killed_study_goes_on_with_the_same_bits(
  tasks, tmp_path, undisturbed, trained
):
  root = tmp_path / 'results'
  killed = subprocess.run(
    [sys.executable, '-m', small_study.__name__, str(tasks), str(root)],
    capture_output=True,
    check=False,
  )
  assert killed.returncode == -9, killed.stderr.decode()[-2000:]
  assert not (root / 'cells.jsonl').exists()
  assert list((root / 'cells').rglob('*.jsonl'))  # the first arm is done
  small_study.study(root, tasks).run()
  # Two bases and, for each of two, two experts, multitask and one held-out.
  assert trained['chunks'] == 2 + 2 * 4 - small_study.LAST
  for name in ('cells.jsonl', 'gates.json'):
    expected = (undisturbed.folder.root / name).read_text()
    assert (root / name).read_text() == expected


def test_gates_that_fail_are_named_before_anything_is_merged(
  undisturbed, tasks, tmp_path, caplog
):
  for name in ('models', 'scores'):
    shutil.copytree(undisturbed.folder.root / name, tmp_path / name)
  # No accuracy rises by so much.
  asked = study_config.Gates(gain=2.0)
  study = small_study.study(tmp_path, tasks, gates=asked)
  with caplog.at_level('WARNING', logger='absl'):
    study.run_part(ARM.name, ('evaluate',))
  assert 'structure_to_text, size xs' in caplog.text
  assert 'by 2.0 did not hold' in caplog.text


@pytest.fixture
def read(monkeypatch):
  """Counts the elements that are read of each checkpoint, by its path."""
  counted = collections.Counter()
  real = source.Checkpoint.read_parts

  def spy(checkpoint, path, parts):
    counted[checkpoint.path] += sum(out.size for _, out in parts)
    return real(checkpoint, path, parts)

  monkeypatch.setattr(source.Checkpoint, 'read_parts', spy)
  return counted


def test_experts_are_read_for_the_rounds_not_for_the_merges(undisturbed, read):
  size = undisturbed.size('xs')
  (subset,) = grid.subsets_of(size, 0)
  made = grid.subset_cells(size, ARM, subset, '')
  assert len({(c.method, str(c.hyperparameters)) for c in made}) >= 3
  # The threshold of TIES takes two rounds over the whole model; the drift is
  # measured from a base that is loaded for all merges of the subset.
  reads = {path: count / size.parameters for path, count in read.items()}
  experts = [
    size.folder.root / record['checkpoint']
    for record in Scored(size, ARM).experts.values()
  ]
  assert reads == {size.base(ARM): 4, **dict.fromkeys(experts, 3)}


def test_a_copied_model_is_compared_once_with_what_was_scored(
  undisturbed, read, tmp_path
):
  """Its files have other times."""
  shutil.copytree(
    undisturbed.folder.root,
    tmp_path,
    copy_function=shutil.copy,
    dirs_exist_ok=True,
  )
  study = small_study.study(tmp_path, undisturbed.config.tasks)
  size, name = study.size('xs'), 'experts/sentiment'
  before = folder.read_json(study.folder.score(ARM, name))
  for _ in range(2):
    demand_as_scored(size, ARM, name)
    path = tmp_path / before['checkpoint']
    assert read == {path: size.parameters}
  after = folder.read_json(study.folder.score(ARM, name))
  assert before.pop('files') != after.pop('files')
  assert after == before


@pytest.mark.parametrize('name', ['base', 'multitask', 'experts/sentiment'])
def test_models_that_are_trained_anew_are_scored_anew(copied, name):
  size = copied.size('xs')
  (subset,) = grid.subsets_of(size, 0)
  record = folder.read_json(copied.folder.score(ARM, name))
  path = copied.folder.root / record['checkpoint']
  params = size.load(path)
  params['final_norm']['scale'] *= -2  # what was likely is not any more
  shutil.rmtree(path)
  with train.resume.Saved(path, {}) as saved:
    saved.save(50, {'params': params})
  with pytest.raises(ValueError, match=f'Remove scores/{ARM.name} and cells/'):
    copied.run_part(ARM.name, ['evaluate'])
  if name != 'multitask':  # which is not merged
    with pytest.raises(ValueError, match=f'Remove scores/{ARM.name} and'):
      grid.subset_cells(size, ARM, subset, '')
  assert grid.is_done(size, ARM, subset)
  copied.folder.score(ARM, name).unlink()
  assert not grid.is_done(size, ARM, subset)
  copied.run_part(ARM.name, ['evaluate'])
  assert not grid.is_done(size, ARM, subset)
  copied.run_part(ARM.name, ['merge'])
  assert grid.is_done(size, ARM, subset)


@pytest.mark.parametrize('name', ['base', 'multitask', 'experts/sentiment'])
def test_cells_are_done_with_the_scores_they_were_made_with(copied, name):
  """All of which a cell repeats: its ratios are of them."""
  size = copied.size('xs')
  (subset,) = grid.subsets_of(size, 0)
  assert grid.is_done(size, ARM, subset)
  record = folder.read_json(copied.folder.score(ARM, name))
  task = next(iter(record['test']))
  record['test'][task][0] += 0.125
  folder.write_json(copied.folder.score(ARM, name), record)
  assert not grid.is_done(size, ARM, subset)


def test_rouge_l_is_not_written_twice(undisturbed, monkeypatch):
  """Where it is the score of the texts it is known already."""
  exam = undisturbed.size('xs').examination
  params = undisturbed.size('xs').load(undisturbed.size('xs').base(ARM))
  assert exam.written(params)
  monkeypatch.setattr(exam, '_text_metric', 'rouge_l')
  assert not exam.written(params)


def test_density_and_scale_are_those_that_do_best_on_validation(undisturbed):
  size = undisturbed.size('xs')
  scored = Scored(size, ARM)
  own = scored.expert_values('validation')
  base = size.load(size.base(ARM))
  experts = [
    size.load(size.folder.root / record['checkpoint'])
    for record in scored.experts.values()
  ]
  kept = {}
  for density, scale in itertools.product((0.5, 0.9), (0.5, 1.0)):
    merged = mk.merge(
      mk.ties(density=density, scale=scale),
      experts,
      base,
      stacked_axes=STACKED_AXES,
    )
    scores = size.examination.scores(merged, 'validation')
    kept[density, scale] = sum(
      score.value / max(own[task], 0.05) for task, score in scores.items()
    )
  assert len(set(kept.values())) > 1
  (chosen,) = (
    cell.hyperparameters
    for cell in cells.load(undisturbed.folder.cells(ARM, '2.0'))
    if (cell.method, cell.setting) == ('ties', 'validated')
  )
  assert kept[chosen['density'], chosen['scale']] == max(kept.values())


def test_a_new_grid_of_merges_needs_no_training(undisturbed, trained, tmp_path):
  changed = dataclasses.replace(undisturbed.config, sweeps={})
  with pytest.raises(ValueError, match='a copy of its models/ and scores/'):
    Folder(undisturbed.folder.root, changed, DIGEST)
  for name in ('models', 'scores'):
    shutil.copytree(undisturbed.folder.root / name, tmp_path / name)
  Study(changed, tmp_path, small_study.FLAGS).run()
  assert not trained
  assert len(cells.load(tmp_path / 'cells.jsonl')) == 8


_OWN_METHOD = """
from pathlib import Path
import sys

import jax.numpy as jnp

from experiments.scale_study.analysis import methods
import mergekit_jax as mk

# As if the entry were in the file.
methods.METHODS['clipped_sum'] = methods.Look('Clipped sum', '#009e73', 'v')

from experiments.scale_study.study_config import MethodGrid
from tests.experiments import small_study

@mk.rule
class Clip:
  limit: float

  def __call__(self, t, deltas):
    return [jnp.clip(d, -self.limit, self.limit) for d in deltas]

def clipped_sum(limit=0.01, scale=0.3):
  return mk.chain(Clip(limit), mk.weighted_sum(), mk.scale(scale))

mk.clipped_sum = clipped_sum
own = {
  'task_arithmetic': MethodGrid({'scale': 0.5}),
  'clipped_sum': MethodGrid({'limit': 9.0, 'scale': 0.5}),
}
results, tasks = map(Path, sys.argv[1:])
small_study.study(results, tasks, methods=own, sweeps={}).run()
"""


def test_a_method_need_not_be_of_the_library(undisturbed, tmp_path):
  """As docs/adding_a_method.md has it, with a limit that no entry reaches."""
  for name in ('models', 'scores'):
    shutil.copytree(undisturbed.folder.root / name, tmp_path / name)
  subprocess.run(
    [sys.executable, '-c', _OWN_METHOD, tmp_path, undisturbed.config.tasks],
    check=True,
  )
  scores = collections.defaultdict(list)
  for line in (tmp_path / 'cells.jsonl').open():
    cell = json.loads(line)
    scores[cell['method']].append(cell['scores'])
  assert scores['clipped_sum'] == scores['task_arithmetic']
  assert len(scores['clipped_sum']) == 4  # two bases, chosen and fixed
  assert 'Clipped sum' in (tmp_path / 'report.html').read_text()


def test_the_average_of_one_expert_is_the_expert(undisturbed):
  config = dataclasses.replace(undisturbed.config, merged=(1, 2))
  size = Size(config, undisturbed.folder, 'xs', undisturbed.source)
  *single, _ = grid.subsets_of(size, 0)
  assert {subset.categories for subset in single} == {
    ('sentiment',),
    ('structure_to_text',),
  }
  scored = Scored(size, ARM)
  for subset in single:
    average, *_ = grid.subset_cells(size, ARM, subset, '')
    (category,) = subset.categories
    expert = scored.experts[category]['test']
    assert (average.method, average.n) == ('average', 1)
    assert average.scores[average.merged_tasks[0]] == next(
      value for value, _ in expert.values()
    )
    assert average.loss == next(loss for _, loss in expert.values())
    # Of both categories, though one alone was learned.
    checkpoint = scored.experts[category]['checkpoint']
    params = size.load(undisturbed.folder.root / checkpoint)
    scores = size.examination.scores(params, 'test', size.source.held_in)
    assert len(scores) == 2
    assert average.losses == {
      task: round(score.loss, 6) for task, score in scores.items()
    }


def test_a_strict_study_refuses_a_merge_that_is_not_the_one_in_memory(
  undisturbed, monkeypatch
):
  config = dataclasses.replace(undisturbed.config, strict=True)
  size = Size(config, undisturbed.folder, 'xs', undisturbed.source)
  (subset,) = grid.subsets_of(size, 0)
  assert grid.subset_cells(size, ARM, subset, '')
  sweep = grid.mk.sweep

  def wrong(rules, experts, base, evaluate, **options):
    def spoil(merged):
      norm = merged['params']['final_norm']
      norm['scale'] = norm['scale'].at[3].multiply(1 + 1e-6)
      return evaluate(merged)

    return sweep(rules, experts, base, spoil, **options)

  monkeypatch.setattr(grid.mk, 'sweep', wrong)
  with pytest.raises(RuntimeError, match=r"average at \['final_norm/scale'\]"):
    grid.subset_cells(size, ARM, subset, '')


def test_what_is_not_done_yet_is_left_out_of_the_report(
  undisturbed, tasks, tmp_path
):
  """With a second seed whose pretrained arm is merged and the other is not."""
  root = tmp_path / 'copy'
  shutil.copytree(undisturbed.folder.root, root)
  study = small_study.study(root, tasks, seeds=(0, 1))
  half = study.folder.cells(Arm('xs', 'pretrained', 1), '2.0')
  half.parent.mkdir(parents=True)
  half.write_text('of no interest')
  said = study.report()
  assert said.endswith('Not done yet, and in no figure: xs/1.')
  assert (root / 'cells.jsonl').read_text() == (
    undisturbed.folder.root / 'cells.jsonl'
  ).read_text()
  study.folder.cells(ARM, '2.0').unlink()
  with pytest.raises(ValueError, match='nothing to report yet'):
    study.report()


def test_gates_that_fail_are_named(undisturbed):
  gates = json.loads((undisturbed.folder.root / 'gates.json').read_text())
  failed = [gate for gate in gates if not gate['pass']]
  failures = undisturbed.failures()
  assert len(failures) == len(failed) > 0
  assert failed[0]['gate'] in failures[0]


def test_another_configuration_is_refused(undisturbed):
  changed = dataclasses.replace(undisturbed.config, expert_steps=100)
  with pytest.raises(ValueError, match='expert_steps was 50 and is 100'):
    Folder(undisturbed.folder.root, changed, DIGEST)
  Folder(
    undisturbed.folder.root,
    dataclasses.replace(undisturbed.config, processes=2),
    folder.read_json(undisturbed.folder.root / 'config.json')['questions'],
  )


def test_a_folder_gains_seeds_and_sizes(undisturbed, tmp_path):
  config = undisturbed.config
  Folder(tmp_path, config, DIGEST)
  more = dataclasses.replace(
    config, seeds=(0, 1), sizes={'s': Scratch(32, 1, 2), **config.sizes}
  )
  (tmp_path / 'models').mkdir()
  Folder(tmp_path, more, DIGEST)
  assert folder.read_json(tmp_path / 'config.json') == {
    **json.loads(json.dumps(study_config.as_json(more))),
    'questions': DIGEST,
  }
  for changes, name in (
    ({'seeds': (1, 2)}, 'seeds'),
    ({'seeds': (0,)}, 'seeds'),
    ({'sizes': config.sizes}, 'sizes'),
    ({'sizes': {**more.sizes, 's': Scratch(16, 2, 2)}}, 'sizes'),
    ({'seeds': (0, 1, 2), 'batch': 4}, 'batch'),
  ):
    with pytest.raises(ValueError, match=f'{name} was .* and is '):
      Folder(tmp_path, dataclasses.replace(more, **changes), DIGEST)


@pytest.mark.parametrize(
  'split, old, new',
  [
    ('test', 'red red green and', 'red black green and'),
    ('validation', '"targets": "red"', '"targets": "blue"'),
    (
      'test',
      '["red", "blue", "green", "white"]',
      '["red", "blue", "green", "white", "grey"]',
    ),
    # It changes the vocabulary, and so what models are shown.
    ('train', 'red red red ?', 'azure red red ?'),
  ],
)
def test_other_questions_are_refused(with_own_tasks, tmp_path, split, old, new):
  path = tmp_path / 'tasks' / f'{split}.jsonl'
  text = path.read_text()
  assert old in text
  with_own_tasks()
  path.write_text(text.replace(old, new))
  with pytest.raises(ValueError, match='Bring back the data of then'):
    with_own_tasks()


def _exchange_answers(tasks, dataset):
  """Of two examples that no first batch has; no other text changes."""
  _, one, *others = list(
    itertools.islice(dataset.examples('train', 0), 8, len(dataset.pool))
  )
  two = next(other for other in others if other.answer != one.answer)
  lines = []
  for line in map(json.loads, (tasks / 'train.jsonl').open()):
    for example, other in ((one, two), (two, one)):
      if line['inputs'] == example.prompt:
        line['targets'] = other.answer
    lines.append(json.dumps(line) + '\n')
  (tasks / 'train.jsonl').write_text(''.join(lines))


@pytest.mark.parametrize(
  'name, part, phase, path',
  [
    ('sentiment', ARM.name, 'experts', 'experts/sentiment/0.01'),
    ('sentiment', ARM.name, 'multitask', 'multitask'),
    ('sentence_completion', ARM.name, 'multitask', 'direct/sentence_compl'),
    ('instruction', 'xs/0', 'bases', 'xs/instruction-tuned/0/base'),
  ],
)
def test_models_of_other_training_data_are_refused(
  with_own_tasks, tmp_path, name, part, phase, path
):
  """Also where the first batch is the same, and all questions."""
  source = with_own_tasks().source
  datasets = {**source.categories, 'instruction': source.instruction}
  _exchange_answers(tmp_path / 'tasks', *datasets[name])
  study = with_own_tasks()
  with pytest.raises(ValueError, match=f'{path}.* training_data is '):
    study.run_part(part, [phase])


def test_a_base_of_another_corpus_is_refused(with_own_tasks, tmp_path):
  path = tmp_path / 'tasks' / 'corpus.jsonl'
  *_, (last,) = itertools.islice(with_own_tasks().source.corpus(0), 64)
  old = last.text  # which the first batch, of 24, has not
  path.write_text(path.read_text().replace(f'"{old}"', f'"{old} {old}"'))
  with pytest.raises(ValueError, match='pretrained/0/base .*training_data is'):
    with_own_tasks().run_part('xs/0', ['bases'])


def test_models_that_do_not_say_of_what_data_they_are_are_accepted(
  copied, trained, monkeypatch
):
  """They are of an older version."""
  identity = train._identity

  def older(*args):
    noted = identity(*args)
    del noted['training_data']
    return noted

  path = copied.folder.model(ARM, 'experts/sentiment/0.01')
  shutil.rmtree(path)
  with monkeypatch.context() as patched:
    patched.setattr(train, '_identity', older)
    copied.run_part(ARM.name, ['experts'])
  assert trained.pop('chunks') == 1
  copied.run_part(ARM.name, ['experts'])
  assert not trained


def test_a_folder_that_does_not_say_what_was_asked_is_accepted(
  undisturbed, tmp_path
):
  """It says so from then on."""
  record = study_config.as_json(undisturbed.config)
  folder.write_json(tmp_path / 'config.json', record)
  Folder(tmp_path, undisturbed.config, DIGEST)
  asked = {'questions': DIGEST}
  assert folder.read_json(tmp_path / 'config.json') == record | asked


@pytest.mark.parametrize(
  'recorded, seeds, fits',
  [((0, 1), (0,), '0,1'), ((2, 0), (1, 0), '2,0,1'), ((3,), (0,), '3,0')],
)
def test_the_seeds_that_a_folder_takes_are_named(
  undisturbed, tmp_path, recorded, seeds, fits
):
  def folder(seeds):
    config = dataclasses.replace(undisturbed.config, seeds=seeds)
    return Folder(tmp_path, config, DIGEST)

  folder(recorded)
  (tmp_path / 'models').mkdir()
  with pytest.raises(ValueError, match=f'Take --set=seeds={fits}\\.$'):
    folder(seeds)
  assert folder(tuple(map(int, fits.split(','))))


@pytest.mark.parametrize(
  'made', ['', 'models', 'scores', 'cells', 'cells.jsonl']
)
def test_a_preset_may_be_corrected_until_something_is_made(
  undisturbed, tmp_path, made
):
  """As after a run that ended at the path of a model."""
  Folder(tmp_path, undisturbed.config, DIGEST)
  corrected = dataclasses.replace(undisturbed.config, batch=4)
  if made:
    (tmp_path / made).touch()
    with pytest.raises(ValueError, match='batch was 8 and is 4.*or remove it'):
      Folder(tmp_path, corrected, DIGEST)
    with pytest.raises(ValueError, match='Bring back the data of then'):
      Folder(tmp_path, undisturbed.config, 16 * '1')
    return
  Folder(tmp_path, corrected, 16 * '1')
  assert folder.read_json(tmp_path / 'config.json') == {
    **study_config.as_json(corrected),
    'questions': 16 * '1',
  }


def test_a_file_is_on_disk_before_it_has_its_name(tmp_path, monkeypatch):
  there_is = []
  monkeypatch.setattr(
    os, 'fsync', lambda _: there_is.append((tmp_path / 'file').exists())
  )
  folder.write_text(tmp_path / 'file', 'text')
  assert there_is == [False]
  assert (tmp_path / 'file').read_text() == 'text'


def test_too_short_rows_are_refused_before_training(tasks, tmp_path):
  with pytest.raises(ValueError, match='more than 5: choose a greater length'):
    small_study.study(tmp_path, tasks, length=5).run()
  assert not (tmp_path / 'models').exists()


def test_what_is_refused_at_once_begins_no_folder(tasks, tmp_path):
  for changes, message in (
    ({'memory_budget': 'foo'}, "'foo' was given; give bytes"),
    ({'merged': (4,)}, 'only 2 held-in categories'),
    ({'methods': {'tiess': MethodGrid()}}, "mean 'ties'.*analysis/methods.py"),
    # One of the library, which the analysis does not know.
    ({'methods': {'dare': MethodGrid()}}, "'dare' .* one of 'average'"),
    ({'methods': {'ties': MethodGrid({'densty': 0.1})}}, "mean 'density'"),
    ({'methods': {'ties': MethodGrid({'density': 2.0})}}, 'ties .*density=2'),
    ({'sweeps': {'dare_ties': {'scale': (1.0,)}}}, "sweeps='dare_ties' .*one"),
    ({'sweeps': {'ties': {'scal': (1.0,)}}}, "mean 'scale'"),
    ({'sweeps': {'ties': {'density': (0.2, 3.0)}}}, 'ties .*density=3'),
  ):
    with pytest.raises(ValueError, match=message):
      small_study.study(tmp_path, tasks, **changes)
  assert not list(tmp_path.iterdir())


def test_a_method_with_an_entry_has_to_be_there(tasks, tmp_path, monkeypatch):
  monkeypatch.setattr(cells, 'METHODS', ('own',))
  with pytest.raises(ValueError, match='set mergekit_jax.own in the preset'):
    small_study.study(tmp_path, tasks, methods={'own': MethodGrid()}, sweeps={})


def test_a_checkpoint_that_does_not_fit_is_refused(undisturbed, tmp_path):
  size = undisturbed.size('xs')
  params = size.load(size.base(ARM))
  params['embedding']['embedding'] = np.zeros((3, 16), np.float32)
  del params['final_norm']
  stored.save(tmp_path / 'model', params)
  with pytest.raises(ValueError, match='does not hold a model') as error:
    size.load(tmp_path / 'model')
  assert 'embedding/embedding' in str(error.value)
  assert 'final_norm/scale: missing' in str(error.value)


def test_held_out_tasks_need_not_have_training_examples(undisturbed, trained):
  """One model less is trained for the gates, and one gate less is checked."""
  source = small_study.without_examples(
    undisturbed.source, 'sentence_completion', 'train'
  )
  folder, config = undisturbed.folder, undisturbed.config
  size = Size(config, folder, 'xs', source)
  for phase in (phases.multitask, evaluate):
    phase(size, ARM)
  assert not trained
  assert len([*gates.check_arm(size, ARM)]) == 6 - 1


@pytest.mark.parametrize('phase', [phases.experts, phases.multitask])
def test_a_dataset_without_training_examples_is_named(undisturbed, phase):
  source = small_study.without_examples(
    undisturbed.source, 'sentiment', 'train'
  )
  size = Size(undisturbed.config, undisturbed.folder, 'xs', source)
  with pytest.raises(ValueError, match='sentiment_in_colours has no train'):
    phase(size, ARM)


def test_without_held_out_tasks_no_gate_is_about_them(undisturbed):
  source = dataclasses.replace(undisturbed.source, held_out={})
  size = Size(undisturbed.config, undisturbed.folder, 'xs', source)
  checked = [*gates.check(size, 0)]
  assert {gate.split for gate in checked} == {'held-in'}
  assert len(checked) == 2 * 4 + 1
