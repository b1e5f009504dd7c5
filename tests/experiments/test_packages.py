"""What is fetched from packages, without a network."""

import zipfile

import pytest

from experiments.scale_study import packages


@pytest.fixture(autouse=True)
def _alone(tmp_path, monkeypatch):
  monkeypatch.setenv('XDG_CACHE_HOME', str(tmp_path / 'cache'))
  monkeypatch.setenv('PIP_NO_INDEX', '1')


def test_what_is_in_the_cache_is_not_made_again():
  made = []

  def make(path):
    made.append(path)
    path.write_text('words')

  first, second = (packages.made_once('words.txt', make) for _ in range(2))
  assert first == second == packages.cache() / 'words.txt'
  assert first.read_text() == 'words'
  assert len(made) == 1


def test_what_two_runs_make_at_once_is_made():
  """The first one that is done counts; a folder cannot be put onto it."""

  def make(path):
    other = packages.cache() / 'model'
    other.mkdir()
    (other / 'weights').write_text('theirs')
    path.mkdir()
    (path / 'weights').write_text('ours')

  folder = packages.made_once('model', make)
  assert (folder / 'weights').read_text() == 'theirs'
  assert [path.name for path in packages.cache().iterdir()] == ['model']


def test_what_was_not_finished_is_made_again():
  def fail(path):
    path.mkdir()
    (path / 'half').touch()
    raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    packages.made_once('model', fail)
  assert not list(packages.cache().iterdir())
  folder = packages.made_once('model', lambda path: path.mkdir())
  assert not list(folder.iterdir())


def test_a_wheel_is_unpacked(tmp_path):
  wheel = tmp_path / 'words-1.0-py3-none-any.whl'
  with zipfile.ZipFile(wheel, 'w') as archive:
    archive.writestr('words/data.txt', 'a b')
    for name, text in (
      ('METADATA', 'Metadata-Version: 2.1\nName: words\nVersion: 1.0\n'),
      ('WHEEL', 'Wheel-Version: 1.0\nTag: py3-none-any\n'),
      ('RECORD', ''),
    ):
      archive.writestr(f'words-1.0.dist-info/{name}', text)
  packages.unpack(str(wheel), tmp_path / 'unpacked')
  assert (tmp_path / 'unpacked/words/data.txt').read_text() == 'a b'


def test_a_package_that_is_missing_is_an_error_with_the_command(tmp_path):
  with pytest.raises(
    packages.NotFetchedError,
    match='pip download --no-deps --no-binary=:all: mergekit-jax-nothing==1',
  ):
    packages.unpack('mergekit-jax-nothing==1', tmp_path, source=True)


def test_without_a_list_of_packages_the_error_has_the_command(
  tmp_path, monkeypatch
):
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(packages.NotFetchedError, match='apt-get update'):
    packages.debian_packages(tmp_path / 'debian.txt')
