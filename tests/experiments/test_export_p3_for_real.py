"""The export of P3 by the library that reads it, from folders as on the Hub."""

import json
import re

import pytest

from experiments.tools import export_p3

pytest.importorskip(
  'datasets', reason='needs datasets, which no extra installs'
)
# What `datasets` itself needs.
parquet = pytest.importorskip('pyarrow.parquet', reason='comes with datasets')
pyarrow = pytest.importorskip('pyarrow', reason='comes with datasets')

_HEAD = """---
dataset_info:
{infos}
configs:
{configs}
---

# Dataset card for P3
"""
_INFO = """- config_name: {name}
  features:
  - name: answer_choices
    sequence: string
  - name: inputs
    sequence: int32
  - name: inputs_pretokenized
    dtype: string
  - name: targets
    sequence: int32
  - name: targets_pretokenized
    dtype: string
  splits:
  - name: train
    num_bytes: 1
    num_examples: {rows}
  - name: validation
    num_bytes: 1
    num_examples: {rows}
  download_size: 1
  dataset_size: 2"""
_CONFIG = """- config_name: {name}
  data_files:
  - split: train
    path: {name}/train-*
  - split: validation
    path: {name}/validation-*"""
_NAMES = ('films_good', 'films_bad', 'films_bad_score_eval')
_ROWS = 40
_DATASETS = {'sentiment': ('films',)}
_OPTIONS = {'examples': 30, 'max_words': 20}


@pytest.fixture
def folder(tmp_path):
  """Two templates of the same items, and a copy for scoring."""
  path = tmp_path / 'P3'
  for name in _NAMES:
    (path / name).mkdir(parents=True)
    for split in ('train', 'validation'):
      rows = [
        {
          'answer_choices': ['yes', 'no '],
          'inputs': [1, 2],
          'inputs_pretokenized': f'{split} {i} . {name} ? ',
          'targets': [3],
          'targets_pretokenized': '\nno' if i % 2 else '\nyes',
        }
        for i in range(_ROWS)
      ]
      # In two files, as the larger ones are.
      for part, some in enumerate((rows[:25], rows[25:])):
        parquet.write_table(
          pyarrow.Table.from_pylist(some),
          path / name / f'{split}-0000{part}-of-00002.parquet',
        )
  infos = '\n'.join(_INFO.format(name=name, rows=_ROWS) for name in _NAMES)
  configs = '\n'.join(_CONFIG.format(name=name) for name in _NAMES)
  (path / 'README.md').write_text(_HEAD.format(infos=infos, configs=configs))
  return path


def test_a_folder_as_on_the_hub_is_exported(folder, tmp_path):
  output = tmp_path / 'out'
  export_p3.export(output, _DATASETS, source=str(folder), **_OPTIONS)
  items = {}
  for split, rows in (('train', 30), ('validation', 15), ('test', 15)):
    text = (output / 'films' / f'{split}.jsonl').read_text()
    lines = [*map(json.loads, text.splitlines())]
    for line in lines:
      name, item, template = re.fullmatch(
        r'(\w+) (\d+) \. films_(\w+) \?', line['inputs']
      ).groups()
      assert name == ('train' if split == 'train' else 'validation')
      assert line['template'] == template
      assert line['answer_choices'] == ['yes', 'no']
      assert line['targets'] == ('no' if int(item) % 2 else 'yes')
      items.setdefault((split, template), []).append(int(item))
    assert len(lines) == 2 * rows
    assert {template for of, template in items if of == split} == {
      'good',
      'bad',
    }
    # The same under both, and mixed.
    assert items[split, 'good'] == items[split, 'bad']
    assert items[split, 'good'] != sorted(items[split, 'good'])
  assert not {*items['validation', 'good']} & {*items['test', 'good']}


def test_a_loading_script_is_told_what_to_be_instead(tmp_path):
  path = tmp_path / 'P3'
  path.mkdir()
  (path / 'P3.py').write_text('import datasets')
  with pytest.raises(ValueError, match=r'P3\.py.*local folder.*README\.md'):
    export_p3.export(tmp_path, _DATASETS, source=str(path), **_OPTIONS)


def test_a_folder_that_is_not_there_is_told(tmp_path):
  path = tmp_path / 'nowhere'
  with pytest.raises(OSError, match=f'{path} cannot be read'):
    export_p3.export(tmp_path, _DATASETS, source=str(path), **_OPTIONS)
