"""Parts, phases and single merges of a study, and what they are told wrong."""

import dataclasses
import shutil

import pytest

from experiments.scale_study import grid, scheduler
from experiments.scale_study.analysis import cells
from experiments.scale_study.folder import Folder
from experiments.scale_study.study import Study
from tests.experiments import made_up_grid, small_study

ARM = small_study.ARM


@pytest.fixture
def as_stored(undisturbed, monkeypatch):
  """Makes what is stored of the subset of all, without merging it again."""
  made = cells.load(undisturbed.folder.cells(ARM, '2.0'))
  monkeypatch.setattr(grid, 'subset_cells', lambda *_: made)
  return made


def name_in(command):
  _, name = command.split(' --cell=')
  return name


def test_the_command_of_a_cell_makes_it_again(undisturbed):
  *_, cell = cells.load(undisturbed.folder.cells(ARM, '2.0'))
  said = undisturbed.reproduce(name_in(cell.command))
  assert said.endswith('The same as stored.')


def test_the_command_of_a_published_cell_trains_its_models_again(
  undisturbed, tmp_path
):
  """From a folder as it is committed: what was collected, and no model."""
  for file in undisturbed.folder.root.iterdir():
    if file.is_file():
      shutil.copy(file, tmp_path)
  study = small_study.study(tmp_path, undisturbed.config.tasks)
  *_, cell = cells.load(undisturbed.folder.cells(ARM, '2.0'))
  said = study.reproduce(name_in(cell.command))
  assert said.endswith('The same as stored.')
  # Its own, and the base that its base was made of.
  trained = {path.parent.name for path in tmp_path.glob('models/*/*/0')}
  assert trained == {ARM.base, 'pretrained'}
  assert not (tmp_path / 'models/xs/pretrained/0/experts').exists()


def test_cells_are_named_before_they_are_made(undisturbed, as_stored):
  size = undisturbed.size('xs')
  (subset,) = grid.subsets_of(size, 0)
  named = grid.names(size, ARM, subset)
  assert sorted(named) == sorted(name_in(cell.command) for cell in as_stored)


def test_a_cell_that_comes_out_otherwise_is_an_error(undisturbed, as_stored):
  cell = as_stored[0]
  path = undisturbed.folder.cells(ARM, '2.0')
  kept = path.read_text()
  path.write_text(kept.replace(f'"drift": {cell.drift}', '"drift": 9.0'))
  with pytest.raises(ValueError, match='is not what is stored'):
    undisturbed.reproduce(name_in(cell.command))
  path.write_text(kept)


def test_a_cell_is_compared_with_collected_ones(
  undisturbed, as_stored, tmp_path
):
  """As they are published: with other flags, and some without losses."""
  shutil.copytree(undisturbed.folder.root, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'cells')
  study = small_study.study(tmp_path, undisturbed.config.tasks)
  cell, another, *_ = as_stored
  published = dataclasses.replace(cell, losses={}, command='make all')
  changed = dataclasses.replace(
    another, losses={task: 9.0 for task in another.losses}
  )
  study.folder.collected.write_text('')
  made_up_grid.append(study.folder.collected, published)
  made_up_grid.append(study.folder.collected, changed)
  said = study.reproduce(name_in(cell.command))
  assert said.endswith('The same as stored.')
  with pytest.raises(ValueError, match='is not what is stored'):
    study.reproduce(name_in(another.command))
  study.folder.collected.unlink()
  said = study.reproduce(name_in(cell.command))
  assert said.endswith('Nothing is stored to compare it with.')


@pytest.mark.parametrize(
  'cell, message',
  [
    ('xl/pretrained/0/2.0/ties/fixed', 'arm.*mean xs/pretrained/0'),
    ('xs/pretrained/0/4.0/ties/fixed', 'subset.*mean 2.0'),
    ('xs/pretrained/0/2.0/tie/fixed', 'merge.*mean .*/2.0/ties/fixed'),
    ('foo', 'arm'),
  ],
)
def test_a_cell_that_there_is_not_trains_nothing(
  tasks, tmp_path, cell, message
):
  with pytest.raises(ValueError, match=f'--cell={cell}: .* such {message}'):
    small_study.study(tmp_path, tasks).reproduce(cell)
  assert not (tmp_path / 'models').exists()


@pytest.mark.parametrize(
  'part, nearest',
  [
    ('foo', 'xs/0'),
    ('z/0', 'xs/0'),
    ('xs/pretrainde/0', 'xs/pretrained/0'),
    ('xs/9', 'xs/0'),
  ],
)
def test_a_part_that_there_is_not_is_refused(tasks, tmp_path, part, nearest):
  with pytest.raises(ValueError, match=f'--part={part}: .*{nearest}'):
    small_study.study(tmp_path, tasks).run_part(part)
  assert not (tmp_path / 'models').exists()


@pytest.mark.parametrize(
  'part, phase, has',
  [
    ('xs/0', 'merge', 'it has bases.'),
    (ARM.name, 'bases', 'it has experts, multitask, evaluate, merge.'),
    (ARM.name, 'report', 'The report is of all parts.'),
  ],
)
def test_a_phase_that_a_part_has_not_is_refused(
  tasks, tmp_path, part, phase, has
):
  with pytest.raises(ValueError, match=f'{part} has no phase {phase}.*{has}'):
    small_study.study(tmp_path, tasks).run_part(part, [phase])


@pytest.mark.parametrize('processes', [1, 2])
def test_a_report_waits_for_no_part(undisturbed, monkeypatch, processes):
  monkeypatch.setattr(Folder, 'lock', pytest.fail)
  monkeypatch.setattr(scheduler, 'run', pytest.fail)
  monkeypatch.setattr(Study, 'report', lambda _: 'said')
  root, tasks = undisturbed.folder.root, undisturbed.config.tasks
  study = small_study.study(root, tasks, processes=processes)
  assert study.run(['report']) == 'said'


def test_only_parts_with_a_wanted_phase_are_started(
  tasks, tmp_path, monkeypatch
):
  started = {}
  monkeypatch.setattr(
    scheduler, 'run', lambda parts, *_, **options: started.update(parts)
  )
  study = small_study.study(tmp_path, tasks, processes=2)
  study.run(['merge'])
  assert started == {f'xs/{base}/0': [] for base in cells.BASES}
  started.clear()
  study.run(['bases', 'merge'])
  assert started == {
    'xs/0': [],
    **{f'xs/{base}/0': ['xs/0'] for base in cells.BASES},
  }


def test_processes_are_started_with_the_flags_of_the_study(
  tasks, tmp_path, monkeypatch
):
  """And so name the same folder in the commands of their cells."""
  commands = []
  monkeypatch.setattr(
    scheduler, 'run', lambda _, command, **options: commands.append(command)
  )
  flags = [*small_study.FLAGS, '--output_dir=here']
  config = small_study.config(tasks, processes=2)
  Study(config, tmp_path, flags).run(['merge'])
  assert commands == [
    ['-m', 'experiments.scale_study', *flags, '--phase=merge']
  ]


@pytest.mark.parametrize(
  'phase, before',
  [
    ('experts', 'bases'),
    ('multitask', 'bases'),
    ('evaluate', 'bases'),
    ('merge', 'evaluate'),
  ],
)
def test_a_phase_names_the_one_that_is_missing(tasks, tmp_path, phase, before):
  with pytest.raises(ValueError, match=f'do --phase={before} first'):
    small_study.study(tmp_path, tasks).run([phase])


@pytest.mark.parametrize(
  'name, phase, before',
  [
    ('base', 'experts', 'bases'),
    ('base', 'multitask', 'bases'),
    ('multitask', 'evaluate', 'multitask'),
  ],
)
def test_what_was_killed_has_to_be_trained_to_its_end(
  undisturbed, tmp_path, name, phase, before
):
  shutil.copytree(undisturbed.folder.root, tmp_path, dirs_exist_ok=True)
  shutil.rmtree(tmp_path / 'scores')
  (trained,) = (tmp_path / 'models' / ARM.name / name).glob('[0-9]*')
  trained.rename(trained.with_name('1'))
  study = small_study.study(tmp_path, undisturbed.config.tasks)
  with pytest.raises(ValueError, match=f'/{name}/.*do --phase={before} first'):
    study.run_part(ARM.name, [phase])


@pytest.mark.parametrize(
  'name, before', [('experts', 'experts'), ('direct', 'multitask')]
)
def test_what_is_scored_has_to_be_trained(undisturbed, tmp_path, name, before):
  shutil.copytree(undisturbed.folder.root, tmp_path, dirs_exist_ok=True)
  for kind in ('models', 'scores'):
    shutil.rmtree(tmp_path / kind / ARM.name / name)
  study = small_study.study(tmp_path, undisturbed.config.tasks)
  with pytest.raises(ValueError, match=f'do --phase={before} first'):
    study.run_part(ARM.name, ['evaluate'])
