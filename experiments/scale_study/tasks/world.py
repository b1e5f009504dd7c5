"""The micro-world: its words, and the sentences that can be said about it.

Everything the model can know is written here. The corpus and the tasks only
combine these sentences, so that what a task asks for was seen in pretraining,
in another format.
"""

from collections.abc import Mapping
import random
from typing import NamedTuple


class Topic(NamedTuple):
  """Things that belong to a topic, and what people do with them."""

  things: tuple[str, ...]
  verbs: tuple[str, ...]


class Relation(NamedTuple):
  """A property of a person: how to state it, how to ask for it."""

  values: tuple[str, ...]
  predicate: str
  questions: tuple[str, ...]


class Scene(NamedTuple):
  """A man and a woman with a thing in a city; `text` tells of all four."""

  man: str
  woman: str
  thing: str
  city: str
  text: str


TOPICS = {
  'sports': Topic(
    ('ball', 'goal', 'racket', 'stadium', 'referee', 'trophy', 'helmet'),
    ('kicked', 'threw'),
  ),
  'food': Topic(
    ('bread', 'soup', 'cheese', 'apple', 'oven', 'butter', 'spoon'),
    ('cooked', 'tasted'),
  ),
  'animals': Topic(
    ('dog', 'horse', 'wolf', 'nest', 'feather', 'lion', 'owl'),
    ('fed', 'petted'),
  ),
  'music': Topic(
    ('song', 'guitar', 'piano', 'drum', 'violin', 'choir', 'flute'),
    ('played', 'heard'),
  ),
  'space': Topic(
    ('planet', 'rocket', 'moon', 'comet', 'galaxy', 'telescope', 'crater'),
    ('launched', 'observed'),
  ),
  'money': Topic(
    ('coin', 'loan', 'cash', 'market', 'wallet', 'salary', 'budget'),
    ('spent', 'counted'),
  ),
}

POSITIVE = ('great', 'lovely', 'superb', 'brilliant', 'pleasant', 'wonderful')
NEGATIVE = ('awful', 'terrible', 'boring', 'dreadful', 'nasty', 'horrible')
PRAISED = ('liked', 'loved', 'enjoyed')
BLAMED = ('hated', 'disliked', 'regretted')

MEN = ('adam', 'bob', 'carl', 'eric', 'fred', 'hugo', 'ivan', 'kyle')
WOMEN = ('anna', 'beth', 'cora', 'emma', 'gina', 'iris', 'jane', 'lucy')
PEOPLE = MEN + WOMEN
THINGS = ('book', 'lamp', 'chair', 'box', 'key', 'clock', 'ring', 'pen')

RELATIONS = {
  'color': Relation(
    ('red', 'blue', 'green', 'yellow', 'black', 'white'),
    'likes the color',
    ('which color does {} like', 'what is the favorite color of {}'),
  ),
  'city': Relation(
    ('paris', 'london', 'rome', 'berlin', 'oslo', 'tokyo'),
    'lives in',
    ('where does {} live', 'which city is {} from'),
  ),
  'drink': Relation(
    ('tea', 'coffee', 'milk', 'juice', 'water', 'cocoa'),
    'drinks',
    ('what does {} drink', 'which drink does {} take'),
  ),
  'job': Relation(
    ('doctor', 'teacher', 'farmer', 'lawyer', 'baker', 'pilot'),
    'works as a',
    ('what is the job of {}', 'what does {} work as'),
  ),
}
CITIES = RELATIONS['city'].values


def facts(rng: random.Random) -> tuple[str, dict[str, str]]:
  """Draws a person and two facts about them, as {relation: value}.

  Facts hold for one text only, so that reading never contradicts memory.
  """
  person = rng.choice(PEOPLE)
  relations = rng.sample(tuple(RELATIONS), 2)
  return person, {
    name: rng.choice(RELATIONS[name].values) for name in relations
  }


def fact_sentence(person: str, facts: Mapping[str, str]) -> str:
  """Says all facts at once: 'ivan lives in oslo and drinks tea'."""
  predicates = (f'{RELATIONS[name].predicate} {facts[name]}' for name in facts)
  return f'{person} {" and ".join(predicates)}'


def question_about(rng: random.Random, person: str, relation: str) -> str:
  """Asks for a fact in one of its wordings, without the question mark."""
  return rng.choice(RELATIONS[relation].questions).format(person)


def topic_sentence(rng: random.Random, topic: str) -> str:
  """Tells of two things of one topic without naming it."""
  person, verb = rng.choice(PEOPLE), rng.choice(TOPICS[topic].verbs)
  one, two = rng.sample(TOPICS[topic].things, 2)
  return rng.choice(
    (
      f'{person} {verb} the {one} with the {two}',
      f'{person} saw the {one} and the {two}',
      f'the {one} was near the {two}',
    )
  )


def opinion_sentence(rng: random.Random, positive: bool) -> str:
  """Judges a thing, by a verb or by an adjective."""
  thing = rng.choice((*THINGS, *TOPICS[rng.choice(list(TOPICS))].things))
  if rng.random() < 0.4:
    verb = rng.choice(PRAISED if positive else BLAMED)
    return f'{rng.choice((*PEOPLE, "everyone"))} {verb} the {thing}'
  adjective = rng.choice(POSITIVE if positive else NEGATIVE)
  return rng.choice(
    (
      f'the {thing} was very {adjective}',
      f'the {thing} was really {adjective}',
      f'it was a {adjective} {thing}',
      f'they found the {thing} {adjective}',
    )
  )


def scene(rng: random.Random) -> Scene:
  """Draws a scene in which nobody is called a man or a woman."""
  man, woman = rng.choice(MEN), rng.choice(WOMEN)
  thing, city = rng.choice(THINGS), rng.choice(CITIES)
  one, two = rng.sample((man, woman), 2)
  text = rng.choice(
    (
      f'{one} and {two} saw the {thing} in {city}',
      f'in {city} {one} gave the {thing} to {two}',
      f'{one} met {two} in {city} near the {thing}',
    )
  )
  return Scene(man, woman, thing, city, text)
