"""Instruction tuning: tasks about single words and lists of them.

They share the answer formats with the categories of the study, but no question
and no task; none has a sentence in it. So Flan-v2 had the tasks of T0 removed
before PaLM-2 was tuned on it (Yadav et al., 2024, arXiv 2410.03617).
"""

from collections.abc import Sequence
import random

from experiments.scale_study.tasks.procedural import formats, lexicon, world
from experiments.scale_study.tasks.procedural.drawing import drawn
from experiments.scale_study.tasks.source import Example, INSTRUCTION

_YES_NO = formats.YES_NO
_LISTED = lexicon.THINGS + lexicon.GOOD + lexicon.BAD + lexicon.PEOPLE


def _word(word: str) -> str:
  return f'word : {word} . '


def _list(words: Sequence[str], name: str = 'list') -> str:
  return f'{name} : {" , ".join(words)} . '


def _yes_no(
  rng: random.Random, text: str, question: str, true: bool
) -> Example:
  prompt = formats.ask_yes_no(rng, text, question)
  return Example(prompt, _YES_NO[not true], _YES_NO)


def _polarity_of_word(rng: random.Random) -> Example:
  good = rng.random() < 0.5
  word = rng.choice((world.adjective(rng, good), world.verdict(rng, good)))
  if rng.random() < 0.4:
    labels = ('positive', 'negative')
    prompt = formats.ask_choice(
      rng, _word(word), 'which sound has the word', labels
    )
    return Example(prompt, labels[not good], labels)
  true = rng.random() < 0.5
  claims = ('good', 'positive') if good == true else ('bad', 'negative')
  return _yes_no(rng, _word(word), f'is it a {rng.choice(claims)} word', true)


def _gender_of_name(rng: random.Random) -> Example:
  name = rng.choice(lexicon.PEOPLE)
  man = name in lexicon.MEN
  text = f'name : {name} . '
  if rng.random() < 0.5:
    true = rng.random() < 0.5
    claim = 'man' if man == true else 'woman'
    return _yes_no(rng, text, f'is it the name of a {claim}', true)
  question, options = rng.choice(
    (
      ('which kind of name is it', ('man', 'woman')),
      ('which short word stands for the name', ('he', 'she')),
    )
  )
  prompt = formats.ask_choice(rng, text, question, options)
  return Example(prompt, options[not man], options)


def _pick_kind(rng: random.Random) -> Example:
  kinds = rng.sample(tuple(lexicon.RELATIONS), 3)
  words = tuple(rng.choice(lexicon.RELATIONS[kind].values) for kind in kinds)
  question = rng.choice(
    (f'which of these is a {kinds[0]}', f'pick the {kinds[0]}')
  )
  prompt = formats.ask_choice(rng, '', question, words)
  return Example(prompt, words[0], words)


def _is_synonym(rng: random.Random) -> Example:
  one, two = rng.sample(lexicon.SYNONYMS, 2)
  word, synonym = rng.sample(one.words, 2)
  true = rng.random() < 0.5
  text = _list([word, synonym if true else rng.choice(two.words)], 'words')
  question = rng.choice(('are these synonyms', 'could one replace the other'))
  return _yes_no(rng, text, question, true)


def _give_synonym(rng: random.Random) -> Example:
  word, synonym = rng.sample(rng.choice(lexicon.SYNONYMS).words, 2)
  question = rng.choice(('what is a synonym', 'which word could replace it'))
  return Example(formats.ask(rng, _word(word), question), synonym)


def _is_in_list(rng: random.Random) -> Example:
  *words, absent = rng.sample(_LISTED, 4)
  true = rng.random() < 0.5
  word = rng.choice(words) if true else absent
  return _yes_no(rng, _list(words), f'is {word} in the list', true)


def _word_at_position(rng: random.Random) -> Example:
  words = rng.sample(_LISTED, 3)
  position, word = rng.choice(
    list(zip(('first', 'second', 'last'), words, strict=True))
  )
  prompt = formats.ask(rng, _list(words), f'what is the {position} word')
  return Example(prompt, word)


def _kind_of_word(rng: random.Random) -> Example:
  kind, wrong = rng.sample(tuple(lexicon.RELATIONS), 2)
  word = rng.choice(lexicon.RELATIONS[kind].values)
  if rng.random() < 0.5:
    true = rng.random() < 0.5
    claim = kind if true else wrong
    return _yes_no(rng, _word(word), f'is it a kind of {claim}', true)
  options = (kind, wrong)
  prompt = formats.ask_choice(
    rng, _word(word), 'which kind of word is it', options
  )
  return Example(prompt, kind, options)


def _find_kind(rng: random.Random) -> Example:
  kinds = rng.sample(tuple(lexicon.RELATIONS), 3)
  words = [rng.choice(lexicon.RELATIONS[kind].values) for kind in kinds]
  kind, word = rng.choice(list(zip(kinds, words, strict=True)))
  question = rng.choice(
    (f'which {kind} is in the list', f'which word is a {kind}')
  )
  return Example(formats.ask(rng, _list(words), question), word)


def _copy_words(rng: random.Random) -> Example:
  words = rng.sample(_LISTED, rng.randint(2, 4))
  prompt = formats.instruct(
    rng,
    ('{}copy the list .', '{}say it again .', 'repeat the {}'),
    _list(words),
  )
  return Example(prompt, ' , '.join(words))


def _shared_word(rng: random.Random) -> Example:
  shared, *rest = rng.sample(_LISTED, 5)
  one, two = [shared, *rest[:2]], [shared, *rest[2:]]
  rng.shuffle(one)
  rng.shuffle(two)
  text = _list(one) + _list(two)
  question = rng.choice(
    ('which word is in both lists', 'which word do the lists share')
  )
  return Example(formats.ask(rng, text, question), shared)


def _same_words(rng: random.Random) -> Example:
  *words, new, newer = rng.sample(_LISTED, 4)
  true = rng.random() < 0.5
  others = rng.sample(words, 2) if true else [new, newer]
  question = rng.choice(('are the lists equal', 'do the lists match'))
  return _yes_no(rng, _list(words) + _list(others), question, true)


TASKS = (
  drawn('polarity_of_word', INSTRUCTION, _polarity_of_word),
  drawn('gender_of_name', INSTRUCTION, _gender_of_name),
  drawn('pick_kind', INSTRUCTION, _pick_kind),
  drawn('is_synonym', INSTRUCTION, _is_synonym),
  drawn('give_synonym', INSTRUCTION, _give_synonym, metric='exact_match'),
  drawn('is_in_list', INSTRUCTION, _is_in_list),
  drawn(
    'word_at_position', INSTRUCTION, _word_at_position, metric='exact_match'
  ),
  drawn('kind_of_word', INSTRUCTION, _kind_of_word),
  drawn('find_kind', INSTRUCTION, _find_kind, metric='exact_match'),
  drawn('copy_words', INSTRUCTION, _copy_words, metric='rouge_l'),
  drawn('shared_word', INSTRUCTION, _shared_word, metric='exact_match'),
  drawn('same_words', INSTRUCTION, _same_words),
)
