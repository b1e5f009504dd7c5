"""WordNet: its file format, and questions whose answers it gives.

The lines are made for the tests, in the format of the real files, so that they
run where WordNet is not installed.
"""

import itertools
import random
import re

import pytest

from experiments.scale_study.tasks import wordnet
from experiments.scale_study.tasks.source import (
  Example,
  HELD_IN,
  HELD_OUT,
  Split,
)
from experiments.scale_study.tasks.splits import split_of
from experiments.scale_study.tasks.wordnet import asking, database, held_in
from experiments.scale_study.tasks.wordnet.database import Key
from experiments.scale_study.tasks.wordnet.words import Entry, Words
from tests.experiments import small_wordnet
from tests.experiments.small_wordnet import KINDS

_KIND_OF = {word: kind for kind, (_, words) in KINDS.items() for word in words}
_SUBJECT = {'05': 'animal', '06': 'artifact'}
# What a guess reaches: one of four or of two, and nothing in free text.
_CHANCE = {
  'word_of_definition': 1 / 4,
  'member_of_kind': 1 / 4,
  'kind_in_definition': 0,
  'word_of_sentence': 0,
  'recall_kind': 0,
  'recall_opposite': 0,
  'subject_of_definition': 1 / 4,
  'is_about_subject': 1 / 2,
  'same_meaning': 1 / 2,
  'same_sentence': 1 / 2,
  'gap': 1 / 4,
  'is_a': 1 / 2,
  'same_sense': 1 / 2,
  'sense_of_word': 1 / 2,
}


def _synset(offset, *words, above=()):
  key, hypernyms = Key('n', offset), tuple(Key('n', of) for of in above)
  return database.Synset(key, 'animal', words, offset, (), hypernyms, ())


def _words(*synsets, common, foils):
  senses = {}
  for synset in synsets:
    for word in synset.words:
      senses[word, 'n'] = *senses.get((word, 'n'), ()), synset
  return Words(
    database.Database(
      {synset.key: synset for synset in synsets},
      senses,
      frozenset((word, 'n') for word in common),
    ),
    foils=foils,
  )


def test_what_is_of_a_kind_by_way_of_another_kind_is_no_foil():
  """A robin is a bird, since it is a songbird; so no foil of gull's."""
  fish = ('eel', 'tuna', 'perch')
  lines = (
    _synset('bird', 'bird'),
    _synset('songbird', 'songbird', above=['bird']),
    _synset('fish', 'fish'),
    _synset('1', 'robin', above=['songbird']),
    _synset('2', 'gull', above=['bird']),
    *(_synset(name, name, above=['fish']) for name in fish),
  )
  words = _words(*lines, common=('robin', 'gull', *fish), foils=1)
  _, dataset = held_in.multiple_choice(words)
  gull = next(e for e in words.entries if e.word == 'gull')
  rng = random.Random(0)
  free = {word for _ in range(50) for word in words.foils(rng, gull, 3)}
  assert 'robin' in free
  asked = {
    example.candidates
    for split in ('train', 'validation', 'test')
    for example in itertools.islice(dataset.examples(split, 0), 300)
    if 'bird ?' in example.prompt and 'songbird' not in example.prompt
  }
  assert asked and all({*options} == {'gull', *fish} for options in asked)
  # Of a fish there are but two others.
  assert {kind for kind, _ in words.kinds_of_members(3)} == {'bird', 'songbird'}


def test_a_pair_of_synonyms_is_in_one_split_in_either_order():
  """Also where the two have two senses in common."""
  pairs = [(f'a{letter}', f'b{letter}') for letter in 'cdfghjklmnpqrstvwxz']
  lines = [
    *(_synset(f'{one}1', one, two) for one, two in pairs),
    *(_synset(f'{one}2', two, one, f'{one}{two}') for one, two in pairs),
  ]
  words = _words(*lines, common=(), foils=0)
  by_word = {line.words[0]: line for line in lines}
  words.entries = [Entry(word, line) for word, line in by_word.items()]
  names = {entry.word: name for name, entry in words.meanings()}
  assert all(names[one] == names[two] for one, two in pairs)
  assert len({*names.values()}) == len(pairs)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
  path = tmp_path_factory.mktemp('wordnet')
  small_wordnet.write(path)
  return path


@pytest.fixture(scope='module')
def source(folder):
  return wordnet.source(folder)


@pytest.fixture(scope='module')
def many(tmp_path_factory):
  """As many words as it takes to have some of every dataset in each split."""
  path = tmp_path_factory.mktemp('many')
  small_wordnet.write(path, times=23)
  return wordnet.source(path)


def _datasets(source):
  found = [*itertools.chain(*source.categories.values()), *source.instruction]
  return {dataset.name: dataset for dataset in found}


def _draw(source, name, count=60):
  return list(
    itertools.islice(_datasets(source)[name].examples('train', 0), count)
  )


def test_a_line_of_a_data_file():
  synset = database.parse_synset(
    '02084071 05 n 03 Dog 0 domestic_dog 0 Canis_familiaris 0 003 '
    '@ 02083346 n 0000 @ 01317541 n 0000 ~ 01322604 n 0000 '
    '| a member of the genus Canis; common; "the dog barked all night"  \n',
    'n',
  )
  assert synset == database.Synset(
    key=Key('n', '02084071'),
    subject='animal',
    words=('dog', 'domestic_dog', 'canis_familiaris'),
    definition='a member of the genus Canis; common',
    examples=('the dog barked all night',),
    hypernyms=(Key('n', '02083346'), Key('n', '01317541')),
    antonyms=(),
  )


def test_a_verb_has_frames_behind_its_pointers():
  synset = database.parse_synset(
    '00004819 29 v 01 sneeze 0 001 @ 00010241 v 0000 01 + 02 00 | exhale  \n',
    'v',
  )
  assert synset.hypernyms == (Key('v', '00010241'),)
  assert (synset.subject, synset.definition) == ('', 'exhale')


def test_satellites_syntax_and_opposites_of_adjectives(folder):
  read = database.read(folder)
  hot = read.synsets[Key('a', '00000100')]
  assert hot.words == ('hot', 'warm')
  assert hot.antonyms == ((0, Key('a', '00000200'), 1),)
  cold = read.synsets[Key('a', '00000200')]
  assert cold.antonyms == ((1, Key('a', '00000100'), 0),)


def test_an_index_tells_the_order_of_senses_and_what_is_common(folder):
  read = database.read(folder)
  first, second = read.senses['crane', 'n']
  assert (first.subject, second.subject) == ('animal', 'artifact')
  assert ('crane', 'n') in read.common
  assert ('bird', 'n') not in read.common
  assert database.parse_index('dog n 2 3 @ ~ #m 2 1 00000007 00000005  \n') == (
    'dog',
    ['00000007', '00000005'],
    1,
  )


def test_opposites_are_of_words_not_of_senses(folder):
  words = Words(database.read(folder), foils=0)
  # The pointer leads from the first word, hot, to the second, cold; cold has
  # one back, but does not occur in tagged texts.
  assert words.opposites() == {'hot': 'cold'}


def test_categories_are_of_the_study(source):
  assert set(source.held_in) <= set(HELD_IN)
  assert set(source.held_out) <= set(HELD_OUT)
  assert all(
    d.held_in == (d.category in HELD_IN) for d in _datasets(source).values()
  )


@pytest.mark.parametrize('name', [*_CHANCE])
def test_splits_are_disjoint_and_a_guess_reaches_what_it_may(many, name):
  dataset = _datasets(many)[name]
  prompts = []
  for split in ('train', 'validation', 'test'):
    drawn = [*itertools.islice(dataset.examples(split, 0), 1000)]
    assert drawn
    for example in drawn:
      assert example.chance == _CHANCE[name]
      assert len({*example.candidates}) * example.chance in (0, 1)
      assert example.answer in (example.candidates or (example.answer,))
    if drawn[0].candidates == ('yes', 'no'):
      # Five standard deviations of a fair coin.
      said = sum(example.answer == 'yes' for example in drawn)
      assert abs(said - len(drawn) / 2) < 5 * len(drawn) ** 0.5 / 2
    prompts.append({example.prompt for example in drawn})
  for one, another in itertools.combinations(prompts, 2):
    assert one.isdisjoint(another)


def test_every_dataset_of_the_categories_is_looked_at(source):
  made = itertools.chain(*source.categories.values())
  assert {dataset.name for dataset in made} == {*_CHANCE}


def test_the_opposite_is_what_the_lines_say(many):
  for example in _draw(many, 'recall_opposite'):
    (end,) = re.findall(r'\bhot(\w?)\b', example.prompt)
    assert example.answer == f'cold{end}'


@pytest.mark.parametrize(
  'name', [name for name in _CHANCE if name != 'recall_opposite']
)
def test_the_answer_is_what_the_lines_say(source, name):
  for example in _draw(source, name):
    assert _answer(name, example.prompt, example.candidates) == example.answer
    assert source.tokenizer.decode(
      source.tokenizer.encode(example.prompt)
    ).replace(' ', '') == example.prompt.replace(' ', '')


def _answer(name, prompt, candidates):
  """Answers from `KINDS` and the text alone."""
  words = re.findall(r'\w+', prompt)
  named = [w for w in words if w.endswith('ing') and w != 'missing']
  called = [w.removesuffix('ing') for w in named]
  kinds = [w for w in words if w in KINDS]
  if name in ('word_of_definition', 'word_of_sentence', 'gap'):
    return called[0] if called else 'crane'
  if name == 'member_of_kind':
    (answer,) = [c for c in candidates if _KIND_OF.get(c) == kinds[0]]
    return answer
  if name == 'kind_in_definition':
    return kinds[0]
  if name == 'recall_kind':
    (word,) = [w for w in words if w in _KIND_OF]
    return _KIND_OF[word]
  if name in ('subject_of_definition', 'is_about_subject'):
    subject = _SUBJECT[KINDS[kinds[0]][0]]
    if name == 'subject_of_definition':
      return subject
    return 'yes' if f'about {subject} ?' in prompt else 'no'
  if name == 'same_meaning':
    first, second = re.findall(r'(?:first|second) : (\w+)', prompt)
    return 'yes' if second == f'{first}x' else 'no'
  if name == 'same_sentence':
    return 'yes' if any(w.endswith('x') for w in words) else 'no'
  if name == 'is_a':
    premise, hypothesis = re.findall(r'it is (\w+)', prompt)
    return 'yes' if hypothesis == _KIND_OF[premise] else 'no'
  plural = [w for w in words if w.removesuffix('s') in KINDS and w[-1] == 's']
  if name == 'same_sense':
    return 'yes' if len(set(plural)) == 1 else 'no'
  kind = plural[0].removesuffix('s')
  return f'a tall {kind}'


@pytest.mark.parametrize('split', ['validation', 'test'])
def test_no_subject_is_in_two_splits(split: Split):
  subjects = [(f'word{i}', f'word{i}') for i in range(200)]
  dataset = asking.asked(
    'words',
    'sentiment',
    subjects,
    lambda rng, word: Example(f'what is {word} ?', 'a word'),
  )
  expected = [word for word, _ in subjects if split_of(word) == split]
  prompts = [example.prompt for example in dataset.examples(split, 0)]
  assert sorted(prompts) == sorted(f'what is {word} ?' for word in expected)
  trained = {
    example.prompt
    for example in itertools.islice(dataset.examples('train', 0), 2000)
  }
  assert trained.isdisjoint(prompts)


def test_foils_are_of_the_same_subject_and_another_kind(source):
  for example in _draw(source, 'word_of_definition'):
    kinds = [_KIND_OF.get(word) for word in example.candidates]
    if example.answer in _KIND_OF:
      files = {KINDS[kind][0] for kind in kinds if kind}
      assert len(files) == 1
      assert kinds.count(_KIND_OF[example.answer]) == 1


def test_what_something_is_by_way_of_its_kind_is_no_foil(source):
  for name in ('word_of_definition', 'is_a'):
    for example in _draw(source, name, 300):
      # The lines do not say what a crane is a kind of.
      if example.answer != 'crane':
        assert 'creature' not in example.prompt


def test_the_corpus_says_what_is_so(source):
  facts = [
    piece.text
    for text in itertools.islice(source.corpus(0), 300)
    for piece in text
    if piece.weight > 1
  ]
  found = [re.findall(r'^(\w+) is a kind of (\w+) \.$', fact) for fact in facts]
  stated = {pair for pairs in found for pair in pairs}
  assert stated and all(_KIND_OF[word] == kind for word, kind in stated)


def test_a_machine_without_wordnet_is_told_how_to_get_it(tmp_path):
  with pytest.raises(wordnet.NotInstalledError, match='apt-get install'):
    wordnet.source(tmp_path)
