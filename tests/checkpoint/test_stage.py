"""The stage of an output by itself: its journal, its lock, what is kept."""

import os

from etils import epath
import jax
import pytest

from mergekit_jax import processes
from mergekit_jax.checkpoint import journal, locks, replace, stage


def staged(path, plan=None, overwrite=False, resume=True):
  return stage.staged(path, plan or {}, overwrite=overwrite, resume=resume)


def stop_after(path, *units, **options):
  """Leaves a stage in which these units are recorded."""
  with pytest.raises(RuntimeError, match='stop'):
    with staged(path, **options) as begun:
      begun.checkpoint.mkdir()
      (begun.checkpoint / 'part.safetensors').write_bytes(b'1')
      begun.checkpoint.rename(f'{begun.checkpoint}-tmp')
      for unit in units:
        begun.record(unit, {'parts': []})
      raise RuntimeError('stop')


def writer(directory, process=0):
  return journal.Writer(epath.Path(directory), process, lambda: None)


class TestJournal:
  @pytest.mark.parametrize('method', ['flush', 'close'])
  def test_survives_a_power_failure(self, tmp_path, monkeypatch, method):
    synced = []
    monkeypatch.setattr(os, 'fsync', lambda file: synced.append(os.fstat(file)))
    lines = writer(tmp_path)
    lines.add(3, {'parts': [1]})
    assert not synced
    getattr(lines, method)()
    (status,) = synced
    assert os.path.samestat(status, os.stat(tmp_path / 'journal.0.jsonl'))
    assert status.st_size == os.stat(tmp_path / 'journal.0.jsonl').st_size > 0

  def test_a_line_follows_one_that_was_cut_off(self, tmp_path):
    (tmp_path / 'journal.0.jsonl').write_text('{"unit": 1}\n{"unit": 2, "pa')
    lines = writer(tmp_path)
    lines.add(3, {})
    lines.close()
    assert journal.read(tmp_path, 0) == {1: {'unit': 1}, 3: {'unit': 3}}

  def test_of_every_process_in_order(self, tmp_path):
    for process in (10, 1, 0):
      lines = writer(tmp_path, process)
      lines.add(process, {})
      lines.close()
    assert [*map(list, journal.read_all(tmp_path))] == [[0], [1], [10]]
    assert [*journal.read(tmp_path, 1)] == [1]


class TestLock:
  def test_names_its_owner_alone(self, tmp_path):
    """Whoever held it before is gone."""
    (tmp_path / locks.NAME).write_text('process 1 on another host')
    with locks.file_locked(tmp_path):
      owner = (tmp_path / locks.NAME).read_text()
    assert owner.startswith(f'process {os.getpid()} on ')
    assert 'another host' not in owner

  def test_is_kept_where_a_merge_begins_anew(self, tmp_path):
    """What lies in the stage is thrown away, but for what others wait at."""
    stop_after(tmp_path / 'out', 0)
    with pytest.raises(RuntimeError, match='stop'):
      with staged(tmp_path / 'out', resume=False) as again:
        assert not again.done
        with pytest.raises(ValueError, match='Another merge'):
          with staged(tmp_path / 'out'):
            pass
        raise RuntimeError('stop')


class TestWhatIsDone:
  def test_is_what_was_recorded(self, tmp_path):
    stop_after(tmp_path / 'out', 4, 2)
    with pytest.raises(RuntimeError, match='stop'):
      with staged(tmp_path / 'out') as again:
        assert [*again.done] == [2, 4]
        raise RuntimeError('stop')

  def test_is_nothing_unless_all_processes_have_a_journal(
    self, tmp_path, monkeypatch
  ):
    stop_after(tmp_path / 'out', 4, 2)
    monkeypatch.setattr(jax, 'process_count', lambda: 2)
    monkeypatch.setattr(processes, 'demand_agreement', lambda facts: None)
    begun = stage.Stage(
      epath.Path(tmp_path / 'out'),
      False,
      epath.Path(tmp_path / 'out.mergekit-tmp/checkpoint'),
      None,
      lambda: None,
    )
    begun.open()
    begun.close()
    assert not begun.done

  @pytest.mark.parametrize('then, now', [({}, {'a': 1}), ({'a': 1}, {})])
  def test_is_of_one_plan(self, tmp_path, then, now):
    """A name that only one of them has is a difference."""
    stop_after(tmp_path / 'out', 0, plan={'b': 2, **then})
    with pytest.raises(ValueError, match='a: .* then, .* now'):
      with staged(tmp_path / 'out', {'b': 2, **now}):
        pass


class TestWhatIsKept:
  def test_units_are_counted_once(self, tmp_path, caplog):
    """However many processes have written parts of them."""
    directory = tmp_path / 'out.mergekit-tmp'
    with caplog.at_level('WARNING', logger='absl'):
      with pytest.raises(RuntimeError, match='stop'):
        with staged(tmp_path / 'out'):
          for process, units in enumerate([(4, 2), (2, 3, 4), (4,)]):
            lines = writer(directory, process)
            for unit in units:
              lines.add(unit, {'parts': []})
            lines.close()
          raise RuntimeError('stop')
    assert 'stopped after 3 boxes' in caplog.text


class TestDestination:
  def publish(self, path, overwrite=False):
    with staged(path, overwrite=overwrite, resume=False) as made:
      made.checkpoint.mkdir()
      (made.checkpoint / 'model.safetensors').write_bytes(b'new')

  def test_what_was_published_is_kept_without_resume(self, tmp_path):
    """It may be gone on with, but is not overwritten unasked."""
    out = epath.Path(tmp_path / 'out')
    self.publish(out)
    tmp = tmp_path / 'out.mergekit-tmp'
    tmp.mkdir()
    (tmp / replace.PLAN).write_text('{}')
    (tmp / replace.COMPLETE).write_text(replace.identity(out))
    assert replace.is_published(out)
    replace.check_destination(out, overwrite=False, resume=True)
    with pytest.raises(FileExistsError, match='pass overwrite=True'):
      replace.check_destination(out, overwrite=False, resume=False)
    # Without a plan nobody can say what it was to become.
    (tmp / replace.PLAN).unlink()
    assert not replace.is_published(out)

  def test_what_an_earlier_overwrite_left_is_removed(self, tmp_path):
    new, out = epath.Path(tmp_path / 'new'), epath.Path(tmp_path / 'out')
    for path in (new, out, tmp_path / 'out.mergekit-old'):
      path.mkdir()
      (path / path.name).write_text('')
    (tmp_path / 'out.mergekit-tmp').mkdir()
    replace.publish(new, out, overwrite=True)
    assert [p.name for p in out.iterdir()] == ['new']
    (old,) = (tmp_path / 'out.mergekit-old').iterdir()
    assert old.name == 'out'

  def test_nothing_aside_is_removed_unless_it_is_replaced(self, tmp_path):
    """Somebody may have kept it under that name."""
    (tmp_path / 'out.mergekit-old').mkdir()
    self.publish(tmp_path / 'out')
    assert (tmp_path / 'out.mergekit-old').exists()
    stop_after(tmp_path / 'other', 0)
    (tmp_path / 'other.mergekit-old').mkdir()
    self.publish(tmp_path / 'other')
    assert (tmp_path / 'other.mergekit-old').exists()
