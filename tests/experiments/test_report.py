"""The report: its files, its table, and when a run fails."""

import csv
import dataclasses
import json

import pytest

from experiments.scale_study import report
from experiments.scale_study.configs.smoke import CONFIG
from experiments.scale_study.results import Results


@pytest.fixture
def results():
  return Results(
    config=CONFIG,
    chance={'topic': 0.25, 'sentiment': 0.5},
    base={'topic': 0.3, 'sentiment': 0.5},
    experts={
      'topic': {'topic': 0.9, 'sentiment': 0.4},
      'sentiment': {'topic': 0.2, 'sentiment': 0.7},
    },
    merges={'average': {'topic': 0.6, 'sentiment': 0.6}},
    unequal_leaves={'average': []},
    seconds={'pretrain': 1.5, 'merge': 0.5},
  )


def test_rows_take_each_expert_on_its_own_task(results):
  topic, sentiment, mean = results.rows()
  assert topic == {
    'task': 'topic',
    'chance': 0.25,
    'base': 0.3,
    'expert': 0.9,
    'average': 0.6,
  }
  assert sentiment['expert'] == 0.7
  assert mean['expert'] == pytest.approx(0.8)


def test_files_hold_the_results(results, tmp_path):
  report.write(results, tmp_path)
  with open(tmp_path / 'results.csv', newline='') as file:
    rows = list(csv.DictReader(file))
  assert [row['task'] for row in rows] == ['topic', 'sentiment', 'mean']
  assert float(rows[0]['expert']) == 0.9
  record = json.loads((tmp_path / 'results.json').read_text())
  assert record['experts']['topic']['sentiment'] == 0.4
  assert record['config']['seed'] == 0
  assert record['failures'] == []
  picture = (tmp_path / 'results.png').read_bytes()
  assert picture.startswith(b'\x89PNG') and len(picture) > 10_000


def test_table_shows_scores_and_seconds(results):
  header, first, *_ = report.table(results).splitlines()
  assert header.split() == ['task', 'chance', 'base', 'expert', 'average']
  assert first.split() == ['topic', '0.250', '0.300', '0.900', '0.600']
  assert report.table(results).splitlines()[-1].split() == ['total', '2.0', 's']


def test_an_expert_must_learn(results):
  assert results.failures() == []
  weak = dataclasses.replace(results, base={'topic': 0.3, 'sentiment': 0.55})
  (failure,) = weak.failures()
  assert failure.startswith('The sentiment expert gains +0.150')


def test_a_streamed_merge_must_equal_the_merge_in_memory(results):
  unequal = {'average': ['layers/norm/scale']}
  (failure,) = dataclasses.replace(results, unequal_leaves=unequal).failures()
  assert 'average' in failure and 'layers/norm/scale' in failure
