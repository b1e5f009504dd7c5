"""Tasks that do not do are refused before anything is trained on them."""

import collections
import json
from pathlib import Path
import re

import pytest

from experiments.scale_study import loading
from experiments.scale_study.folder import Folder
from experiments.scale_study.study_config import Gates
from experiments.scale_study.tasks import wordnet
from tests.experiments import small_study


@pytest.fixture
def tasks(tmp_path):
  small_study.write_tasks(tmp_path / 'tasks')
  return tmp_path / 'tasks'


def load(tasks, **changes):
  return loading.load_source(small_study.config(tasks, **changes))


def edit(tasks, split, change):
  """Rewrites a file, without the lines of which `change` returns None."""
  path = tasks / f'{split}.jsonl'
  lines = map(change, map(json.loads, path.read_text().splitlines()))
  path.write_text(''.join(json.dumps(line) + '\n' for line in lines if line))


def without(*categories):
  return lambda line: line if line['category'] not in categories else None


def test_what_is_only_tested_is_not_trained_on(tasks, caplog):
  assert load(tasks)
  assert 'direct training' not in caplog.text
  edit(tasks, 'train', without('sentence_completion'))
  with caplog.at_level('WARNING', logger='absl'):
    source = load(tasks)
  assert 'direct training can learn sentence_completion' in caplog.text
  assert [*source.held_out] == ['sentence_completion']
  assert loading.direct(small_study.config(tasks), source) == {}
  caplog.clear()
  load(tasks, direct_steps=0)
  assert 'direct training' not in caplog.text


@pytest.mark.parametrize(
  'split, category',
  [
    ('train', 'instruction'),
    ('train', 'sentence_completion'),
    ('train', 'sentiment'),
    ('validation', 'sentiment'),
    ('test', 'sentence_completion'),
  ],
)
def test_what_is_too_long_is_refused_wherever_it_is_used(
  tasks, split, category
):
  def lengthen(line):
    if line['category'] == category:
      line['inputs'] = f'{"very " * 12} {line["inputs"]}'
    return line

  edit(tasks, split, lengthen)
  with pytest.raises(ValueError, match='more than 12: .*very very'):
    load(tasks)


def test_a_long_line_is_found_behind_a_thousand_others(tasks):
  line = {
    'targets': 'red',
    'answer_choices': [],
    'category': 'structure_to_text',
    'dataset': 'structure_to_text_in_colours',
    'template': 'plain',
  }
  prompts = [*(f'{number} ?' for number in range(1000)), 20 * 'very ']
  with (tasks / 'train.jsonl').open('a') as file:
    for prompt in prompts:
      file.write(json.dumps({'inputs': prompt, **line}) + '\n')
  with pytest.raises(ValueError, match='more than 12: .*very very'):
    load(tasks)


def test_candidates_have_to_fit_as_well(tasks):
  def lengthen(line):
    if line['category'] == 'sentence_completion':
      line['answer_choices'] = [*small_study.COLOURS, 'red ' * 12]
    return line

  edit(tasks, 'train', lengthen)
  assert load(tasks)  # answers alone are learned
  edit(tasks, 'test', lengthen)
  with pytest.raises(ValueError, match='more than 12: .*red red'):
    load(tasks)


def test_tasks_without_a_held_in_category_are_refused(tasks):
  for split in ('train', 'validation', 'test'):
    edit(tasks, split, without('sentiment', 'structure_to_text'))
  with pytest.raises(ValueError, match='no held-in category.*topic_classific'):
    load(tasks)


def test_categories_are_chosen(tasks):
  """The vocabulary is of all, so that ids are the same."""
  for split in ('train', 'validation', 'test'):
    path = tasks / f'{split}.jsonl'
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    third = [
      {
        **line,
        'inputs': f'about {line["inputs"]}',
        'category': 'topic_classification',
        'dataset': 'topics',
      }
      for line in lines
      if line['category'] == 'sentiment'
    ]
    path.write_text(''.join(f'{json.dumps(x)}\n' for x in lines + third))
  few = ('sentiment', 'structure_to_text')
  every, some = load(tasks), load(tasks, categories=few)
  assert {*every.held_in} == {*few, 'topic_classification'}
  assert {*some.held_in} == {*few}
  assert [*some.held_out] == [*every.held_out]
  assert some.tokenizer.words == every.tokenizer.words
  with pytest.raises(ValueError, match='only 1 held-in .* another'):
    load(tasks, merged=(1, 2), categories=('sentiment',))
  with pytest.raises(
    ValueError, match='no tasks in .*, only of sentiment, topic'
  ):
    load(tasks, categories=('sentiment', 'summarization'))
  with pytest.raises(ValueError, match='sentences are no held-in categories'):
    load(tasks, categories=('sentences',))


def test_tasks_without_instruction_tuning_say_when_they_have_it(tasks):
  edit(tasks, 'train', without('instruction'))
  for split in ('validation', 'test'):
    edit(tasks, split, without('instruction'))
  with pytest.raises(ValueError, match='instruction tuning: take --set=bases'):
    load(tasks)
  few = ('sentiment', 'topic_classification')
  with pytest.raises(ValueError, match='2 of the 8 categories, only with all'):
    load('procedural', categories=few)


def test_more_experts_than_there_are_cannot_be_merged(tasks, caplog):
  with caplog.at_level('WARNING', logger='absl'):
    load(tasks, merged=(2, 4, 6))
  assert 'There are 2 held-in categories' in caplog.text
  assert 'N = 4, 6.' in caplog.text
  with pytest.raises(ValueError, match='take --set=merged=2'):
    load(tasks, merged=(4, 6))


def test_what_is_not_installed_is_named(tasks, monkeypatch):
  monkeypatch.setattr(wordnet, 'source', lambda: wordnet.demand(tasks))
  with pytest.raises(ValueError, match='no WordNet in .* Install it'):
    load('wordnet')


def test_chance_is_in_the_metric_of_the_score(tasks):
  """What is right in no answer but one has words in common with others."""
  said = {
    'train': ['red blue', 'green green', 'red blue'],
    'validation': ['red'],
    'test': ['red green', 'red blue', 'white blue', 'white white'],
  }
  for split, answers in said.items():
    edit(tasks, split, without('structure_to_text'))
    with (tasks / f'{split}.jsonl').open('a') as file:
      for number, answer in enumerate(answers):
        line = {
          'inputs': f'{split} {number}',
          'targets': answer,
          'answer_choices': None,
          'category': 'structure_to_text',
          'dataset': 'words',
          'template': 'plain',
        }
        file.write(json.dumps(line) + '\n')
  settings = dict(text_metric='rouge_l', length=24)
  (dataset,) = load(tasks, **settings).held_in['structure_to_text']
  # 'red blue' has ½, 1, ½ and 0; 'green green' has ½, 0, 0 and 0.
  assert dataset.constant == pytest.approx((0.5 + 1 + 0.5) / 4)


@pytest.mark.parametrize(
  'category, gates, above',
  [
    # 0.9 + 0.2 is more than there is to have, 0.9 + 0.1 is all.
    ('sentiment', Gates(learnable=0.2), '0.2'),
    ('sentiment', Gates(learnable=0.1), None),
    ('sentence_completion', Gates(learnable=0.2, transfer=0.1), '0.2'),
    ('sentence_completion', Gates(learnable=0.1, transfer=0.2), '0.2'),
  ],
)
def test_gates_that_cannot_be_passed_are_told(
  tasks, caplog, category, gates, above
):
  """Nine answers of ten are the same, in training as well."""
  seen = collections.Counter()

  def change(line):
    if line['category'] == category:
      seen[category] += 1
      if seen[category] > 10:
        return None
      line['targets'] = 'blue' if seen[category] == 1 else 'red'
    return line

  for split in ('train', 'validation', 'test'):
    edit(tasks, split, change)
    seen.clear()
  with caplog.at_level('WARNING', logger='absl'):
    load(tasks, gates=gates, test_examples=10)
  said = [line for line in caplog.messages if 'cannot pass' in line]
  assert len(said) == (above is not None)
  for line in said:
    assert line.startswith(
      f'{category} cannot pass its gates: a model has to be {above} above '
      f'chance, which is 0.90 ({category}_in_colours 0.90)'
    )


def test_answers_without_words_are_told_where_rouge_l_scores(tasks, caplog):
  def change(line):
    if line['category'] == 'structure_to_text' and 'red ' in line['inputs']:
      line['targets'] = '☺ ?'
    return line

  edit(tasks, 'test', change)
  with caplog.at_level('WARNING', logger='absl'):
    load(tasks)
    assert 'ROUGE-L' not in caplog.text
    load(tasks, text_metric='rouge_l', test_examples=99)
  changed = (tasks / 'test.jsonl').read_text().count('"targets": "\\u263a ?"')
  assert f'{changed} test answers have none, such as' in caplog.text


def test_a_new_word_of_training_is_not_called_a_change_of_the_test(
  tasks, tmp_path
):
  """It changes the ids of what is tested, and so the digest."""
  config, results = small_study.config(tasks), tmp_path / 'results'
  (results / 'models').mkdir(parents=True)
  Folder(results, config, loading.digest(config, loading.load_source(config)))
  path = tasks / 'train.jsonl'
  path.write_text(path.read_text().replace('red red red ?', 'azure red red ?'))
  changed = loading.digest(config, loading.load_source(config))
  with pytest.raises(ValueError, match='or the vocabulary that is made of the'):
    Folder(results, config, changed)


def test_the_data_of_the_documents_are_read(tmp_path):
  page = Path(__file__).parents[2] / 'docs' / 'scale_study.md'
  files = re.findall(
    r'^`(\w+\.jsonl)`.*:\n\n```json\n([^`]*)```',
    page.read_text('utf-8'),
    re.MULTILINE,
  )
  assert len(files) == 4
  for name, text in files:
    (tmp_path / name).write_text(text)
  source = load(tmp_path, merged=(2,), length=100)
  metrics = {
    name: [(one.name, one.metric) for one in datasets]
    for name, datasets in source.categories.items()
  }
  assert metrics == {
    'closed_book_qa': [('capitals', 'exact_match')],
    'sentiment': [('films', 'accuracy')],
    'sentence_completion': [('ends', 'accuracy')],
  }
  assert [one.name for one in source.instruction] == ['do']
  assert 'Paris' in next(source.corpus(0))[0].text
