"""What the grid writes: read back as it was, or refused with the reason."""

import dataclasses
import json

import pytest

from experiments.scale_study.analysis import cells
from tests.experiments import made_up_grid

_STUDY = made_up_grid.study(ns=(2,), seeds=1, sizes={'s': 100})
_CELL = _STUDY.cells[0]


def test_cells_are_read_back_as_they_were(tmp_path):
  path = tmp_path / 'cells.jsonl'
  for cell in _STUDY.cells[:3]:
    made_up_grid.append(path, cell)
  assert cells.load(path) == _STUDY.cells[:3]
  assert len(path.read_text().splitlines()) == 3


def test_gates_are_read_back_as_they_were(tmp_path):
  made_up_grid.write(_STUDY, tmp_path)
  entry = json.loads((tmp_path / 'gates.json').read_text())[0]
  assert entry['pass'] is True
  assert cells.load_gates(tmp_path / 'gates.json') == _STUDY.gates


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'method': 'tiess'}, "method is 'tiess', not one of average, task"),
    ({'n': 3}, 'n is 3, but subset is'),
    ({'n': True}, 'n is True, not int'),
    ({'loss': float('nan')}, 'loss is nan, not a finite float'),
    ({'base': 'PT'}, "base is 'PT', not one of ['pretrained'"),
    ({'scores': {}}, "scores lacks ['multiple_choice_qa'"),
    ({'expert': {}}, 'expert lacks'),
    ({'multitask': {'topic': 0.5}}, 'multitask lacks'),
    ({'subset': ('topic', 'poetry')}, "subset names ['poetry']"),
    ({'checkpoints': {'base': 'x'}}, 'checkpoints must be'),
    ({'checkpoints': {'base': 'x', 'experts': {}}}, 'not of the subset'),
    ({'drift': -1.0}, 'drift must not be negative'),
  ],
)
def test_an_invalid_cell_is_refused(changes, said):
  with pytest.raises(ValueError) as error:
    cells.validate(dataclasses.replace(_CELL, **changes))
  assert said in str(error.value)


def test_no_multitask_model_is_allowed():
  cells.validate(dataclasses.replace(_CELL, multitask={}))


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    (lambda entry: entry.pop('seed'), "fields missing: ['seed']"),
    (lambda entry: entry.update(lambda_=1), "fields unknown: ['lambda_']"),
    (lambda entry: entry.update(seed='0'), "seed is '0', not int"),
  ],
)
def test_an_invalid_line_is_named(tmp_path, change, said):
  path = tmp_path / 'cells.jsonl'
  made_up_grid.append(path, _CELL)
  entry = json.loads(path.read_text())
  change(entry)
  path.write_text(path.read_text() + json.dumps(entry) + '\n')
  with pytest.raises(ValueError) as error:
    cells.load(path)
  assert 'cells.jsonl, line 2: ' in str(error.value)
  assert said in str(error.value)


def test_a_torn_line_is_named(tmp_path):
  path = tmp_path / 'cells.jsonl'
  made_up_grid.append(path, _CELL)
  path.write_text(path.read_text() + '{"size": "s", "par')
  with pytest.raises(ValueError, match='line 2: '):
    cells.load(path)


def test_one_merge_twice_is_an_error(tmp_path):
  path = tmp_path / 'cells.jsonl'
  again = dataclasses.replace(_CELL, subset=_CELL.subset[::-1], loss=2.0)
  made_up_grid.append(path, _CELL)
  made_up_grid.append(path, again)
  with pytest.raises(ValueError, match='lines 1 and 2 are the same merge'):
    cells.load(path)


def test_points_of_a_sweep_are_not_one_merge(tmp_path):
  path = tmp_path / 'cells.jsonl'
  for split in ('test', 'validation'):
    for scale in (0.2, 0.5):
      point = {'setting': 'sweep', 'hyperparameters': {'scale': scale}}
      made_up_grid.append(
        path, dataclasses.replace(_CELL, split=split, **point)
      )
  assert len(cells.load(path)) == 4


def test_a_size_has_one_number_of_parameters(tmp_path):
  path = tmp_path / 'cells.jsonl'
  made_up_grid.append(path, _CELL)
  made_up_grid.append(path, dataclasses.replace(_CELL, seed=1, parameters=101))
  with pytest.raises(ValueError, match=r"'s' has \[100, 101\] parameters"):
    cells.load(path)


def test_no_cell_is_an_error(tmp_path):
  (tmp_path / 'cells.jsonl').write_text('')
  with pytest.raises(ValueError, match='holds no cell'):
    cells.load(tmp_path / 'cells.jsonl')


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'split': 'test'}, "split is 'test', not one of"),
    ({'pass': 'yes'}, "passed is 'yes', not bool"),
  ],
)
def test_an_invalid_gate_is_named(tmp_path, change, said):
  made_up_grid.write(_STUDY, tmp_path)
  path = tmp_path / 'gates.json'
  gates = json.loads(path.read_text())
  path.write_text(json.dumps([gates[0], gates[1] | change]))
  with pytest.raises(ValueError) as error:
    cells.load_gates(path)
  assert 'gates.json, entry 1: ' in str(error.value)
  assert said in str(error.value)
