"""Sentences about the micro-world, and the facts that never change in it."""

from collections.abc import Iterable, Sequence
import itertools
import random
from typing import NamedTuple, TypeVar

from experiments.scale_study.tasks.procedural import lexicon
from experiments.scale_study.tasks.procedural.lexicon import (
  ADJECTIVES,
  NOUNS,
  PEOPLE,
  RELATIONS,
  TOPICS,
)

T = TypeVar('T')

TOPIC_NAMES = tuple(TOPICS)


class Fact(NamedTuple):
  """`person` stands in `relation` to `value`."""

  person: str
  relation: str
  value: str

  @property
  def predicate(self) -> str:
    """'drinks tea'."""
    return f'{RELATIONS[self.relation].predicate} {self.value}'

  @property
  def sentence(self) -> str:
    """'ivan drinks tea'."""
    return f'{self.person} {self.predicate}'

  @property
  def questions(self) -> tuple[str, ...]:
    """Asks for the value in every wording, without question marks."""
    wordings = RELATIONS[self.relation].questions
    return tuple(wording.format(self.person) for wording in wordings)


class Scene(NamedTuple):
  """A man and a woman with a thing in a city; `text` tells of all four."""

  man: str
  woman: str
  thing: str
  city: str
  text: str


class Pair(NamedTuple):
  """A man and a woman, one of them meant by a pronoun.

  Attributes:
    names: both, in the order in which a text names them.
    pronoun: 'he' or 'she'.
    meant: who it stands for.
  """

  names: tuple[str, str]
  pronoun: str
  meant: str


class Concept(NamedTuple):
  """What a person did with what kind of thing, apart from the wording.

  Attributes:
    person: who.
    adjective: index of `lexicon.ADJECTIVES`.
    noun: index of `lexicon.NOUNS`.
  """

  person: str
  adjective: int
  noun: int


def _unchanging_facts() -> tuple[Fact, ...]:
  rng, facts = random.Random('facts'), []
  for name, relation in RELATIONS.items():
    # Each value is as frequent as the others: guessing gains nothing.
    values = itertools.cycle(relation.values)
    people = rng.sample(lexicon.RESIDENTS, len(lexicon.RESIDENTS))
    facts += map(Fact, people, itertools.repeat(name), values)
  return tuple(facts)


FACTS = _unchanging_facts()


def other(rng: random.Random, choices: Iterable[T], *excluded: T) -> T:
  """Chooses anything but what is excluded."""
  return rng.choice([choice for choice in choices if choice not in excluded])


def visitor_facts(rng: random.Random, count: int) -> list[Fact]:
  """Draws facts of different relations about one visitor."""
  person = rng.choice(lexicon.VISITORS)
  return [
    Fact(person, name, rng.choice(RELATIONS[name].values))
    for name in rng.sample(tuple(RELATIONS), count)
  ]


def tell(facts: Sequence[Fact]) -> str:
  """Says facts of one person at once: 'ivan lives in oslo and drinks tea'."""
  predicates = ' and '.join(fact.predicate for fact in facts)
  return f'{facts[0].person} {predicates}'


def thing_of(rng: random.Random, topic: str) -> str:
  """Chooses a thing of a topic."""
  return rng.choice(TOPICS[topic].things)


def action_of(rng: random.Random, topic: str) -> str:
  """Does something of a topic: 'fed the owl'."""
  return f'{rng.choice(TOPICS[topic].verbs)} the {thing_of(rng, topic)}'


def topic_sentence(
  rng: random.Random, topic: str, thing: str | None = None
) -> str:
  """Tells of two things of a topic without naming it.

  Args:
    rng: source of randomness.
    topic: one of `TOPIC_NAMES`.
    thing: if given, takes the place of one of the two.
  """
  things = rng.sample(TOPICS[topic].things, 2)
  if thing is not None:
    things[rng.randrange(2)] = thing
  one, two = things
  person, verb = rng.choice(PEOPLE), rng.choice(TOPICS[topic].verbs)
  return rng.choice(
    (
      f'{person} {verb} the {one} with the {two}',
      f'{person} {verb} the {one} and saw the {two}',
      f'{person} looked at the {one} and the {two}',
      f'the {one} was near the {two}',
    )
  )


def adjective(rng: random.Random, good: bool) -> str:
  """Chooses an adjective that praises or blames."""
  return rng.choice(lexicon.GOOD if good else lexicon.BAD)


def verdict(rng: random.Random, good: bool) -> str:
  """Chooses a verb that praises or blames."""
  return rng.choice(lexicon.PRAISED if good else lexicon.BLAMED)


def opinion_sentence(rng: random.Random, good: bool) -> str:
  """Judges a thing by a verb, by an adjective or by denying one."""
  thing = rng.choice((*lexicon.THINGS, thing_of(rng, rng.choice(TOPIC_NAMES))))
  kind = rng.random()
  if kind < 0.35:
    who = rng.choice((*PEOPLE, 'everyone', 'they'))
    return f'{who} {verdict(rng, good)} the {thing}'
  if kind < 0.45:
    return f'the {thing} was not {adjective(rng, not good)}'
  return rng.choice(
    (
      f'the {thing} was very {adjective(rng, good)}',
      f'the {thing} was really {adjective(rng, good)}',
      f'it was a {adjective(rng, good)} {thing}',
      f'they found the {thing} {adjective(rng, good)}',
    )
  )


def pair(rng: random.Random) -> Pair:
  """Draws a man and a woman, and which of them is meant."""
  man, woman = rng.choice(lexicon.MEN), rng.choice(lexicon.WOMEN)
  pronoun, meant = rng.choice((('he', man), ('she', woman)))
  one, two = rng.sample((man, woman), 2)
  return Pair((one, two), pronoun, meant)


def scene(rng: random.Random) -> Scene:
  """Draws a scene in which nobody is called a man or a woman."""
  (one, two), _, _ = pair(rng)
  man, woman = (one, two) if one in lexicon.MEN else (two, one)
  thing, city = rng.choice(lexicon.THINGS), rng.choice(lexicon.CITIES)
  text = rng.choice(
    (
      f'{one} and {two} saw the {thing} in {city}',
      f'in {city} {one} gave the {thing} to {two}',
      f'{one} met {two} in {city} near the {thing}',
    )
  )
  return Scene(man, woman, thing, city, text)


def concept(rng: random.Random) -> Concept:
  """Draws a concept."""
  return Concept(
    rng.choice(PEOPLE),
    rng.randrange(len(ADJECTIVES)),
    rng.randrange(len(NOUNS)),
  )


def contradict(rng: random.Random, of: Concept) -> Concept:
  """Says something else of the same person: other adjective, other noun."""
  return Concept(
    of.person,
    other(rng, range(len(ADJECTIVES)), of.adjective),
    other(rng, range(len(NOUNS)), of.noun),
  )


def deed(rng: random.Random, of: Concept) -> str:
  """'lucy crossed the big road', in words and order drawn anew."""
  verb = NOUNS[of.noun].company
  word, noun = _words(rng, of)
  return rng.choice(
    (
      f'{of.person} {verb} the {word} {noun}',
      f'the {noun} that {of.person} {verb} was {word}',
    )
  )


def sight(rng: random.Random, of: Concept) -> str:
  """'lucy saw the big road', in words drawn anew."""
  return f'{of.person} saw the {" ".join(_words(rng, of))}'


def possessed(rng: random.Random, of: Concept) -> str:
  """'the big road of lucy', in words drawn anew."""
  return f'the {" ".join(_words(rng, of))} of {of.person}'


def _words(rng: random.Random, of: Concept) -> tuple[str, str]:
  return (
    rng.choice(ADJECTIVES[of.adjective].words),
    rng.choice(NOUNS[of.noun].words),
  )
