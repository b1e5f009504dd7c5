"""The export of P3, on local data in its schema."""

import collections
import itertools
import json
import random
import sys
import types

from absl import flags
from absl.testing import flagsaver
import pytest

from experiments.scale_study.tasks import p3
from experiments.scale_study.tasks.source import HELD_IN, HELD_OUT
from experiments.tools import export_p3

_FILMS = {
  # Configuration: rows of each split.
  'films_is_it_good': {
    'train': [('a fine film . good ?', 'yes'), ('a dull film . good ?', 'no')],
    'validation': [(f'film {i} . good ?', 'yes') for i in range(6)],
  },
  'films_is_it_bad': {
    'train': [('a fine film . bad ?', 'no'), ('long ' * 30, 'yes')],
    'test': [('a new film . bad ?', 'no'), ('an old film . bad ?', 'maybe')],
  },
  'films_is_it_bad_score_eval': {'test': [('scored', 'yes')]},
  'films2_other': {'test': [('another dataset', 'yes')]},
  'stories_end': {
    'train': [('never read', 'yes')],
    'validation': [(f'story {i}', 'no') for i in range(4)],
  },
}
_DATASETS = {'sentiment': ('films',), 'sentence_completion': ('stories',)}


def _row(inputs, targets):
  return {
    'inputs': [1, 2],
    'inputs_pretokenized': f'{inputs} ',
    'targets_pretokenized': f'\n{targets}',
    'answer_choices': ['yes', 'no '],
  }


class _Rows(list):
  """As much of an iterable dataset as the tool uses."""

  # Whether rows change their places.
  shuffles = False

  def shuffle(self, seed, buffer_size):
    """Draws from a buffer that the rows behind it fill up again."""
    if not self.shuffles:
      return self
    rng, rows = random.Random(seed), iter(self)
    buffer, drawn = [*itertools.islice(rows, buffer_size)], []
    for row in rows:
      place = rng.randrange(len(buffer))
      drawn.append(buffer[place])
      buffer[place] = row
    return _Rows([*drawn, *rng.sample(buffer, len(buffer))])

  def take(self, count):
    return _Rows(self[:count])


@pytest.fixture
def library(monkeypatch):
  """Stands in for Hugging Face datasets, which tests do not install."""
  module = types.SimpleNamespace(
    get_dataset_config_names=lambda source: list(_FILMS),
    load_dataset=lambda source, configuration, streaming: {
      split: _Rows(itertools.starmap(_row, rows))
      for split, rows in _FILMS[configuration].items()
    },
  )
  monkeypatch.setitem(sys.modules, 'datasets', module)


@pytest.fixture
def main(library, monkeypatch):
  """Runs the tool with these flags and returns what went wrong."""
  monkeypatch.setattr(export_p3, 'DATASETS', _DATASETS)

  def run(*given):
    flags.FLAGS([export_p3.__name__, *given])
    return export_p3.main([export_p3.__name__])

  with flagsaver.flagsaver():
    yield run
  flags.FLAGS.unparse_flags()


def _export(folder, **options):
  export_p3.export(
    folder,
    _DATASETS,
    **{'source': 'local', 'examples': 100, 'max_words': 20} | options,
  )


def _read(path):
  return [json.loads(line) for line in path.read_text().splitlines()]


def test_the_study_reads_what_is_exported(library, tmp_path):
  _export(tmp_path)
  source = p3.source(tmp_path)
  (films,) = source.held_in['sentiment']
  assert {
    e.prompt for e in itertools.islice(films.examples('train', 0), 9)
  } == {
    'a fine film . good ?',
    'a dull film . good ?',
    'a fine film . bad ?',
  }
  (stories,) = source.held_out['sentence_completion']
  tested = list(stories.examples('test', 0))
  assert sorted(e.prompt for e in tested) == [f'story {i}' for i in range(4)]
  assert {e.candidates for e in tested} == {('yes', 'no')}


def test_a_row_with_one_choice_is_of_no_use():
  row = _row('a question', 'yes') | {'answer_choices': ['yes', 'yes ']}
  assert export_p3.record(row, 'sentiment', 'films', 'any') == (
    'nothing to choose from'
  )
  row = _row('where ?', 'York') | {'answer_choices': ['York', 'a b', 'a  b']}
  assert export_p3.record(row, 'sentiment', 'places', 'any') == (
    'choices differ by white space alone'
  )


def test_what_p3_calls_validation_is_divided(library, tmp_path):
  _export(tmp_path)
  validation = _read(tmp_path / 'films' / 'validation.jsonl')
  test = _read(tmp_path / 'films' / 'test.jsonl')
  assert [line['inputs'] for line in validation] == [
    'film 0 . good ?',
    'film 2 . good ?',
    'film 4 . good ?',
    'a new film . bad ?',
  ]
  assert [line['inputs'] for line in test] == [
    'film 1 . good ?',
    'film 3 . good ?',
    'film 5 . good ?',
  ]
  assert {line['template'] for line in validation} == {
    'is_it_good',
    'is_it_bad',
  }
  assert not (tmp_path / 'stories' / 'train.jsonl').exists()


@pytest.fixture
def songs(library, monkeypatch):
  """Two templates of the same items."""
  monkeypatch.setattr(_Rows, 'shuffles', True)
  templates = {
    f'songs_{template}': {
      'train': [('a song', 'yes')],
      'validation': [(f'song {i} . {template} ?', 'yes') for i in range(40)],
    }
    for template in ('good', 'bad')
  }
  for name, splits in templates.items():
    monkeypatch.setitem(_FILMS, name, splits)
  return templates


def _items(path):
  """The items of a split by template."""
  items = collections.defaultdict(set)
  for line in _read(path):
    items[line['template']].add(line['inputs'].partition(' . ')[0])
  return items


def test_an_item_is_in_the_same_split_under_all_templates(
  songs, tmp_path, caplog
):
  caplog.set_level('WARNING', 'absl')
  options = {'source': 'local', 'examples': 100, 'max_words': 20}
  export_p3.export(tmp_path, {'sentiment': ('songs',)}, **options)
  validation = _items(tmp_path / 'songs' / 'validation.jsonl')
  test = _items(tmp_path / 'songs' / 'test.jsonl')
  assert validation['good'] == validation['bad']
  assert test['good'] == test['bad']
  assert len(validation['good']) == len(test['good']) == 20
  assert 'different numbers' not in caplog.text
  del songs['songs_bad']['validation'][3]
  export_p3.export(tmp_path, {'sentiment': ('songs',)}, **options)
  assert "{'good': 40, 'bad': 39}" in caplog.text


@pytest.fixture
def reviews(library, monkeypatch):
  """As long and as sorted as imdb, the longest of the sorted datasets."""
  monkeypatch.setattr(_Rows, 'shuffles', True)

  def rows(name, of_each):
    return [
      (f'{name} {i} ?', answer)
      for answer in ('no', 'yes')
      for i in range(of_each)
    ]

  splits = {'train': rows('train', 12_500), 'validation': rows('v', 12_500)}
  monkeypatch.setitem(_FILMS, 'reviews_plain', splits)
  return splits


def _export_reviews(folder):
  options = {'source': 'local', 'examples': 100, 'max_words': 20}
  export_p3.export(folder, {'sentiment': ('reviews',)}, **options)


def test_data_that_are_sorted_by_label_are_mixed(reviews, tmp_path, caplog):
  caplog.set_level('WARNING', 'absl')
  _export_reviews(tmp_path)
  for split, rows in (('train', 100), ('validation', 50), ('test', 50)):
    answers = [
      line['targets'] for line in _read(tmp_path / f'reviews/{split}.jsonl')
    ]
    # Five standard deviations of a fair draw, √rows / 2 each.
    assert abs(answers.count('yes') - rows / 2) < 5 * rows**0.5 / 2
  assert 'the same answer' not in caplog.text


def test_a_split_with_one_answer_is_told(reviews, tmp_path, caplog):
  caplog.set_level('WARNING', 'absl')
  reviews['train'] = [row for row in reviews['train'] if row[1] == 'no']
  _export_reviews(tmp_path)
  assert 'reviews: all train examples of plain have the same' in caplog.text
  assert 'all test examples' not in caplog.text


def test_examples_are_limited(library, tmp_path):
  _export(tmp_path, examples=2)
  assert len(_read(tmp_path / 'stories' / 'test.jsonl')) == 2


def test_a_dataset_that_is_not_there_is_named(library, tmp_path):
  with pytest.raises(ValueError, match="begins with 'plays_'"):
    export_p3.export(
      tmp_path,
      {'sentiment': ('plays',)},
      source='local',
      examples=1,
      max_words=9,
    )


def test_a_folder_may_have_some_of_the_datasets(library, tmp_path, caplog):
  caplog.set_level('WARNING', 'absl')
  datasets = {'sentiment': ('plays', 'films')}
  options = {'source': 'local', 'examples': 9, 'max_words': 20}
  export_p3.export(tmp_path, datasets, **options)
  assert [path.name for path in tmp_path.iterdir()] == ['films']
  assert 'no configuration of local begins so: plays_.' in caplog.text


def test_a_folder_without_a_list_is_told_how_to_have_one(library, tmp_path):
  """The library then makes one configuration of all files."""
  sys.modules['datasets'].get_dataset_config_names = lambda _: ['default']
  with pytest.raises(ValueError, match="'films_' or 'stories_' among") as told:
    _export(tmp_path)
  assert 'README.md' in str(told.value)
  assert 'README.md' in (export_p3.__doc__ or '')


@pytest.mark.parametrize(
  ('configuration', 'lost', 'said'),
  [
    ('films_is_it_good', 'train', 'has validation, and needs .* and train:'),
    ('stories_end', 'validation', 'has train, and needs validation or test:'),
  ],
)
def test_a_configuration_says_which_split_it_lacks(
  library, monkeypatch, tmp_path, configuration, lost, said
):
  monkeypatch.delitem(_FILMS[configuration], lost)
  with pytest.raises(ValueError, match=f'{configuration} {said}'):
    _export(tmp_path)


def test_a_source_that_cannot_be_read_says_so(main, tmp_path):
  def unreachable(source):
    raise ConnectionError(f'Couldn’t reach {source}')

  sys.modules['datasets'].get_dataset_config_names = unreachable
  assert main(f'--output={tmp_path}', '--source=far') == (
    'far cannot be read (Couldn’t reach far). Give --source a name on the Hub, '
    'where there is a network, or a local folder.'
  )


def test_no_folder_is_named_that_was_not_written(main, tmp_path, capsys):
  """Rows have two words or more, with the answer."""
  output = tmp_path / 'p3'
  with pytest.raises(flags.IllegalFlagValueError, match='--examples=0'):
    main(f'--output={output}', '--examples=0')
  told = main(f'--output={output}', '--source=far', '--max_words=1')
  assert told and told.startswith('No example of far is left')
  assert not output.exists() and not capsys.readouterr().out
  assert main(f'--output={output}', '--max_words=9') is None
  assert capsys.readouterr().out == f'Wrote {output}.\n'


@pytest.mark.parametrize(
  ('inputs', 'targets', 'reason'),
  [(' ', 'yes', 'no text'), ('good ?', '', 'no text'), ('good ?', 'so', 'cho')],
)
def test_useless_rows_have_a_reason(inputs, targets, reason):
  record = export_p3.record(_row(inputs, targets), 'sentiment', 'films', 't')
  assert isinstance(record, str) and reason in record


def test_rows_without_an_answer_have_no_text():
  row = _row('good ?', 'yes')
  for without in (row | {'targets_pretokenized': None}, {'answer': 'yes'}):
    record = export_p3.record(without, 'sentiment', 'films', 't')
    assert record == 'no text'


def test_without_the_library_pip_is_named(monkeypatch, tmp_path):
  monkeypatch.setitem(sys.modules, 'datasets', None)
  with pytest.raises(ImportError, match='pip install datasets'):
    _export(tmp_path)


def test_the_choice_of_datasets_is_of_the_study():
  assert tuple(export_p3.DATASETS) == (*HELD_IN, *HELD_OUT)
  sizes = {c: len(names) for c, names in export_p3.DATASETS.items()}
  assert {sizes[category] for category in HELD_IN} == {2}
  assert sum(sizes[category] for category in HELD_OUT) == 7
