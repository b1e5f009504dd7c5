"""`mergekit-jax verify` finds damage and names it."""

from __future__ import annotations

import json

import numpy as np
import orbax.checkpoint as ocp
import pytest

import mergekit_jax as mk
from mergekit_jax import cli
from mergekit_jax.verify import verify
from tests import checkpoints


@pytest.fixture(params=['orbax', 'safetensors'])
def merged(request, tmp_path):
  base, experts = checkpoints.save_set(
    tmp_path / 'set', {'a': (64, 96), 'b': (5,)}, experts=2
  )
  output = tmp_path / 'out'
  mk.merge_checkpoints(
    mk.average(), experts=experts, output=output, format=request.param
  )
  return output


def run(*arguments):
  return cli.main(cli.parse(['mergekit-jax', *map(str, arguments)]))


def test_an_output_as_it_was_written(merged, capsys):
  assert verify(merged) == []
  assert run('verify', merged) == 0
  assert 'is as it was written' in capsys.readouterr().out


def test_damage_is_found_and_named(merged, capsys):
  largest = max(merged.rglob('*'), key=lambda f: f.is_file() * f.stat().st_size)
  data = bytearray(largest.read_bytes())
  stored = np.asarray(mk.open_checkpoint(merged).read('params/a'))
  at = data.find(stored.tobytes()[:32])
  assert at >= 0
  data[at] ^= 1
  largest.write_bytes(data)
  (damage,) = verify(merged)
  assert damage.startswith('params/a: the part at [0, 0]')
  assert run('verify', merged) == 1
  assert 'params/a' in capsys.readouterr().out


@pytest.fixture
def published(tmp_path):
  """An output with all that lies beside the weights of a published model."""
  base, output = tmp_path / 'base', tmp_path / 'out'
  arrays = {name: np.ones(4, np.float32) for name in 'ab'}
  checkpoints.save_shards(base, arrays)
  (base / 'additional_chat_templates').mkdir()
  for name in FILES[1:-1]:
    (base / name).write_text('{}')
  mk.merge_checkpoints(mk.average(), experts=[base], output=output)
  return output


FILES = [
  'config.json',
  'tokenizer.json',
  'additional_chat_templates/rag.jinja',
  'mergekit_jax_copied.sha256',
]


@pytest.mark.parametrize('name', FILES)
def test_a_file_beside_the_weights(published, capsys, name):
  file = published / name
  written = file.read_bytes()
  file.write_bytes(written + b' ')
  assert verify(published) == [f'{file}: is not what was written']
  assert run('verify', published) == 1
  assert str(file) in capsys.readouterr().out
  file.unlink()
  assert verify(published) == [f'{file}: missing']
  file.mkdir()
  (damage,) = verify(published)
  assert damage.startswith(f'{file}: cannot be read: ')
  file.rmdir()
  file.write_bytes(written)
  (published / 'notes.txt').write_text('of somebody')
  assert verify(published) == []


def test_an_index_that_says_something_else(published):
  index = published / 'model.safetensors.index.json'
  index.write_text(index.read_text() + ' ')
  assert verify(published) == [f'{index}: is not what was written']


def test_a_report_of_before_files_were_recorded(published):
  report = published.parent / 'out.report.json'
  facts = json.loads(report.read_text())
  assert set(facts.pop('companions')) > {*FILES}
  report.write_text(json.dumps(facts))
  assert verify(published) == []


def test_a_leaf_that_is_missing_is_named(merged):
  report = merged.parent / 'out.report.json'
  facts = json.loads(report.read_text())
  facts['checksums']['params/gone'] = facts['checksums']['params/b']
  report.write_text(json.dumps(facts))
  assert verify(merged) == ['params/gone: missing']


def test_a_report_that_is_damaged(merged, capsys):
  report = merged.parent / 'out.report.json'
  report.write_text(report.read_text()[:-9])
  with pytest.raises(ValueError, match='out.report.json is no report of a'):
    verify(merged)
  assert run('verify', merged) == 1
  assert 'restore it from a copy' in capsys.readouterr().err


def test_a_compressed_part_that_cannot_be_read_is_named(tmp_path):
  leaves = {'a': (64, 96), 'b': (5,)}
  _, experts = checkpoints.save_set(tmp_path / 'set', leaves, experts=2)
  output = tmp_path / 'out'
  mk.merge_checkpoints(
    mk.average(), experts=experts, output=output, compression='zstd'
  )
  assert verify(output) == []
  largest = max(output.rglob('*'), key=lambda f: f.is_file() * f.stat().st_size)
  largest.unlink()
  (damage,) = [line for line in verify(output) if line.startswith('params/a:')]
  assert 'the part at [0, 0] cannot be read' in damage


@pytest.fixture
def trained_on(tmp_path):
  """The output of a merge of a manager's step 10, and step 11 beside it."""
  tree = lambda value: {'params': {'w': np.full((4, 3), value, np.float32)}}
  save = lambda manager, step, value: manager.save(
    step, args=ocp.args.StandardSave(tree(value))
  )
  with ocp.CheckpointManager(tmp_path / 'base') as manager:
    save(manager, 10, 1)
  output = tmp_path / 'merged'
  mk.merge_checkpoints(mk.average(), experts=[tmp_path / 'base'], output=output)
  with ocp.CheckpointManager(output) as manager:
    save(manager, 11, 2)
  return output


@pytest.mark.parametrize('given', ['.', '10', '10/default'])
def test_what_training_saves_beside_it_is_no_damage(trained_on, given):
  moved = trained_on.rename(trained_on.parent / 'moved')
  report = trained_on.parent / 'merged.report.json'
  report = report.rename(trained_on.parent / 'moved.report.json')
  assert verify(moved / given) == []
  facts = json.loads(report.read_text())
  facts['checksums']['params/w'][0][2] ^= 1
  report.write_text(json.dumps(facts))
  (damage,) = verify(moved / given)
  assert damage.startswith('params/w: the part at [0, 0]')


@pytest.mark.parametrize('given', ['11', '11/default'])
def test_what_training_saves_has_no_report(trained_on, given):
  name = given.rpartition('/')[2]
  with pytest.raises(FileNotFoundError, match=f'{name}.report.json is missing'):
    verify(trained_on / given)


@pytest.mark.parametrize('call', ['', 'restore(', "restore('/elsewhere')"])
def test_a_report_of_another_place_is_damaged(trained_on, call):
  report = trained_on.parent / 'merged.report.json'
  facts = json.loads(report.read_text())
  facts['restore'] = facts['restore'].partition('restore(')[0] + call
  report.write_text(json.dumps(facts))
  with pytest.raises(ValueError, match='merged.report.json is no report of a'):
    verify(trained_on)


def test_without_a_report(merged):
  (merged.parent / 'out.report.json').unlink()
  with pytest.raises(FileNotFoundError, match='report beside it'):
    verify(merged)


def test_a_leaf_that_nobody_recorded(merged):
  report = merged.parent / 'out.report.json'
  facts = json.loads(report.read_text())
  del facts['checksums']['params/b']
  report.write_text(json.dumps(facts))
  assert verify(merged) == ['params/b: 0 of its 5 elements have a checksum']
  facts['checksums']['params/a'].append(facts['checksums']['params/a'][0])
  report.write_text(json.dumps(facts))
  assert len(verify(merged)) == 2


def test_all_that_is_wrong_with_one_leaf_is_named(merged):
  report = merged.parent / 'out.report.json'
  facts = json.loads(report.read_text())
  facts['checksums']['params/b'] = [[[0], [2], 7], [[4], [2], 7]]
  report.write_text(json.dumps(facts))
  few, changed, unreadable = verify(merged)
  assert few == 'params/b: 4 of its 5 elements have a checksum'
  assert changed == (
    'params/b: the part at [0] of shape [2] is not what was written'
  )
  assert unreadable.startswith('params/b: the part at [4] cannot be read: ')


def test_a_report_whose_checksums_have_no_names(merged):
  report = merged.parent / 'out.report.json'
  report.write_text(json.dumps({'checksums': [1, 2]}))
  with pytest.raises(ValueError, match='is no report of a merge'):
    verify(merged)
