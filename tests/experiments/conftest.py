"""A small study, run once for all tests that look at it."""

import fcntl
import os

from matplotlib.figure import Figure
import pytest

from tests.experiments import small_study


@pytest.fixture(scope='session')
def shared(tmp_path_factory):
  """A folder that all workers have."""
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  folder = folder / 'small'
  folder.mkdir(exist_ok=True)
  return folder


@pytest.fixture(scope='session')
def undisturbed(shared):
  """The study, made by the worker that comes first. Nobody may change it."""
  said = shared / 'said.txt'
  with (shared / 'lock').open('w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not (shared / 'tasks').exists():
      small_study.write_tasks(shared / 'tasks')
    study = small_study.study(shared / 'undisturbed', shared / 'tasks')
    if not said.exists():
      said.write_text(study.run())
  study.said = said.read_text()
  return study


@pytest.fixture(scope='session')
def tasks(shared, undisturbed):
  """Of that study."""
  del undisturbed  # which writes them
  return shared / 'tasks'


@pytest.fixture
def blank_pictures(monkeypatch):
  """Leaves pictures empty, where nobody looks: they take most of a report."""
  monkeypatch.setattr(
    Figure, 'savefig', lambda _, file, **options: file.write(b'')
  )
