"""A small study, run once for all tests that look at it."""

import pytest

from tests.experiments import small_study


@pytest.fixture(scope='session')
def tasks(tmp_path_factory):
  folder = tmp_path_factory.mktemp('small') / 'tasks'
  small_study.write_tasks(folder)
  return folder


@pytest.fixture(scope='session')
def undisturbed(tasks, tmp_path_factory):
  study = small_study.study(tmp_path_factory.mktemp('undisturbed'), tasks)
  study.said = study.run()
  return study
