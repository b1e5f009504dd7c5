"""Real tasks: how texts are read, whether labels are right, a whole study."""

import dataclasses
import itertools
import re

import pytest

from experiments.scale_study import loading
from experiments.scale_study.analysis import cells
from experiments.scale_study.configs import smollm2 as preset
from experiments.scale_study.study import Study
from experiments.scale_study.study_config import MethodGrid, Scratch
from experiments.scale_study.tasks import real, wordnet
from experiments.scale_study.tasks.real import held_in, texts
from experiments.scale_study.tasks.source import HELD_IN
from experiments.scale_study.tasks.wordnet import database
from tests.experiments import small_real

CHANCE = {
  'movie_sentences': 1 / 2,
  'debian_sections': 1 / 5,
  'word_of_definition': 1 / 4,
  'subject_of_word': 1 / 4,
  'word_of_sentence': 1 / 4,
  'field_of_record': 1 / 3,
  'kind_of_definition': 1 / 4,
  'same_meaning': 1 / 2,
  'last_word': 1 / 4,
  'sense_of_word': 1 / 2,
}
every_task = pytest.mark.parametrize('name', CHANCE)


@pytest.fixture(scope='module')
def cache(tmp_path_factory):
  home = tmp_path_factory.mktemp('cache')
  small_real.write_cache(home / 'mergekit_jax' / 'packages')
  return home


@pytest.fixture(autouse=True)
def _packages(cache, monkeypatch):
  """Everything is in the cache and WordNet is installed."""
  monkeypatch.setenv('XDG_CACHE_HOME', str(cache))
  monkeypatch.setattr(wordnet, 'demand', lambda folder: None)
  monkeypatch.setattr(database, 'read', lambda folder: small_real.database())


@pytest.fixture
def source(_packages):
  return real.source()


def _dataset(source, name):
  found = itertools.chain(*source.categories.values())
  return next(dataset for dataset in found if dataset.name == name)


def _answer(name, prompt):
  """Answers by how `small_real` makes its words and texts."""
  user, assistant = re.fullmatch(
    r'user\n(.*)<\|im_end\|>\n<\|im_start\|>assistant\n(.*)', prompt
  ).groups()
  if name == 'movie_sentences':
    return ' positive' if 'good' in user else ' negative'
  if name == 'debian_sections':
    return ' ' + re.search(r'\? (\w+) tool', user)[1]
  if name == 'word_of_definition':
    subject, end = re.search(r'"(\w+) of (\w+)"', user).groups()
    return f' {subject[:2]}{end}'
  if name == 'subject_of_word':
    return ' ' + small_real.WORDS[re.search(r'"(\w+)"', user)[1]]
  if name == 'word_of_sentence':
    return ' ' + re.match(r'"long tale about (\w+) town"', user)[1]
  if name == 'field_of_record':
    begun = {
      'It is a kind of': 'kind',
      'It is about': 'field',
      'It is no': 'unlike',
    }[assistant]
    return ' ' + re.search(rf'{begun}: (\w+)', user)[1]
  if name == 'kind_of_definition':
    subject, end = re.search(r'(\w+) of (\w+)$', user).groups()
    return ' ' + small_real.kind(f'{subject[:2]}{end}')
  if name == 'same_meaning':
    one, other = re.findall(r'"(\w+)"', user)
    return ' yes' if other == f'{one}y' else ' no'
  if name == 'last_word':
    word = re.fullmatch(r'by (\w+)ing town i see the', assistant)[1]
    return f' {word}'
  word = re.search(r'"(\w+)"', user)[1]
  return f' {word}{"y" if "i see" in user else "z"}'


@every_task
def test_the_answer_is_what_the_texts_say(source, name):
  examples = _dataset(source, name).examples('train', 0)
  for example in itertools.islice(examples, 80):
    assert _answer(name, example.prompt) == example.answer
    assert example.answer in example.candidates
    assert example.chance == CHANCE[name]


def test_a_rare_sense_of_a_word_is_no_wrong_answer(source):
  examples = _dataset(source, 'subject_of_word').examples('train', 0)
  for example in itertools.islice(examples, 80):
    usual = example.answer.strip()
    assert f' {small_real.next_subject(usual)}' not in example.candidates


@every_task
def test_answers_are_one_token_and_examples_are_short(source, name):
  tokenizer = source.tokenizer
  examples = _dataset(source, name).examples('train', 0)
  for example in itertools.islice(examples, 80):
    assert [len(tokenizer.encode(c)) for c in example.candidates] == [1] * len(
      example.candidates
    )
    assert len(tokenizer.encode(example.prompt)) + 3 <= real.LENGTH


@every_task
def test_what_is_asked_about_is_in_one_split(source, name):
  """Options and their order differ; the number, word or definition does not."""
  pattern = {
    'movie_sentences': r'film \d+',
    'debian_sections': r'\w+ tool \d+',
    'last_word': r'by \w+',
    'sense_of_word': r'in ".*"',
    'kind_of_definition': r'\w+ of \w+<',
  }.get(name, r'"[^"]*"')
  dataset = _dataset(source, name)
  groups = [
    {
      re.search(pattern, example.prompt)[0]
      for example in itertools.islice(dataset.examples(split, 0), 1000)
    }
    for split in ('train', 'validation', 'test')
  ]
  assert all(groups)
  assert sum(map(len, groups)) == len(set().union(*groups))


def test_ratings_near_zero_and_what_is_unreadable_are_left_out():
  lines = (
    "1\t0.9\tmeh\n2\t-1.0\ta  ''bad''  film\n3\t3.5\tgood\n"
    '4\t3.5\tcaf\ufffd\n5\t2.0\tgood'
  )
  assert texts.parse_sentences(lines) == [
    texts.Labelled('a "bad" film', 'negative', 'a "bad" film'),
    texts.Labelled('good', 'positive', 'good'),
  ]


def test_of_variants_of_a_package_the_first_is_kept():
  records = (
    'Package: a\nDescription: A game: of war\nSection: games\n\n'
    'Package: a-data\nDescription: A game: of war (data files)\n'
    'Section: games\n\n'
    'Package: b\nDescription: sends mail - server\nSection: mail\n\n'
    'Package: c\nDescription: a library\nSection: libs\n\n'
    'Package: d\nSection: mail\n'
  )
  assert texts.parse_descriptions(records) == [
    texts.Labelled('A game: of war', 'games', 'a game: of war'),
    texts.Labelled('sends mail - server', 'mail', 'sends mail'),
  ]


def test_every_topic_is_asked_about_as_often():
  descriptions = [
    texts.Labelled(f'{topic} {n}', topic, f'{topic} {n}')
    for topic, count in (('mail', 30), ('games', 300))
    for n in range(count)
  ]
  dataset = held_in.topic(descriptions)
  prompts = {
    (e.answer, re.search(r'\w+ \d+', e.prompt)[0])
    for split in ('train', 'validation', 'test')
    for e in itertools.islice(dataset.examples(split, 0), 2000)
  }
  answers = [answer for answer, _ in prompts]
  assert answers.count(' mail') == answers.count(' games') == 30


def test_without_wordnet_the_error_has_the_command(monkeypatch, tmp_path):
  monkeypatch.undo()
  with pytest.raises(
    wordnet.NotInstalledError, match='apt-get install wordnet'
  ):
    real.source(tmp_path)


@pytest.mark.usefixtures('blank_pictures')
@pytest.mark.parametrize('categories', [preset.CONFIG.categories, HELD_IN])
def test_the_preset_from_the_file_to_the_report(tmp_path, categories):
  config = dataclasses.replace(
    preset.CONFIG,
    categories=categories,
    seeds=(1,),
    expert_steps=2,
    multitask_steps=2,
    validation_examples=4,
    test_examples=4,
    merged=(len(categories),),
    methods={'average': MethodGrid()},
  )
  Study(config, tmp_path / 'results', ['--preset=smollm2']).run()
  made = cells.load(tmp_path / 'results' / 'cells.jsonl')
  assert [cell.setting for cell in made] == ['validated', 'fixed']
  assert {(cell.base, cell.seed) for cell in made} == {('instruction-tuned', 1)}
  assert all(cell.drift > 0 for cell in made)
  for cell in made:
    assert {*cell.subset} == {*categories}
    assert (len(cell.held_in), len(cell.held_out)) == (len(categories), 2)
  assert (tmp_path / 'results' / 'report.html').exists()


def test_a_category_that_there_is_not_is_refused():
  with pytest.raises(ValueError, match='haiku are no held-in categories'):
    real.source(categories=('sentiment', 'haiku'))


def test_a_base_that_is_not_there_is_refused(tmp_path):
  config = dataclasses.replace(
    preset.CONFIG, bases=('pretrained', 'instruction-tuned')
  )
  study = Study(config, tmp_path, [])
  with pytest.raises(ValueError, match='take --set=bases=instruction-tuned'):
    study.size('135m')


def test_real_texts_are_not_for_models_from_scratch():
  scratch = {'s': Scratch(width=16, layers=1, heads=2)}
  config = dataclasses.replace(preset.CONFIG, sizes=scratch)
  with pytest.raises(ValueError, match='have none for instruction tuning'):
    loading.load_source(config)
  with pytest.raises(ValueError, match='no texts for pretraining'):
    next(
      loading.load_source(
        dataclasses.replace(config, bases=('pretrained',))
      ).corpus(0)
    )
