"""The words of the micro-world and what is known of each."""

from typing import NamedTuple


class Topic(NamedTuple):
  """Things that belong to a topic, and what people do with them."""

  things: tuple[str, ...]
  verbs: tuple[str, str]


class Relation(NamedTuple):
  """A property of a person.

  Attributes:
    values: what it can be.
    predicate: states it: `{predicate} {value}`.
    questions: three wordings that ask for it.
  """

  values: tuple[str, ...]
  predicate: str
  questions: tuple[str, str, str]


class Synonyms(NamedTuple):
  """Two words of one meaning and a word that goes with either."""

  words: tuple[str, str]
  company: str


TOPICS = {
  'sports': Topic(
    tuple(
      'ball goal racket stadium referee trophy helmet jersey medal'.split()
    ),
    ('kicked', 'threw'),
  ),
  'food': Topic(
    tuple('bread soup cheese apple oven butter spoon salad rice'.split()),
    ('cooked', 'tasted'),
  ),
  'animals': Topic(
    tuple('dog horse wolf nest feather lion owl tail paw'.split()),
    ('fed', 'petted'),
  ),
  'music': Topic(
    tuple('song guitar piano drum violin choir flute melody opera'.split()),
    ('played', 'heard'),
  ),
  'space': Topic(
    tuple(
      'planet rocket moon comet galaxy telescope crater orbit probe'.split()
    ),
    ('launched', 'observed'),
  ),
  'money': Topic(
    tuple('coin loan cash market wallet salary budget tax debt'.split()),
    ('spent', 'counted'),
  ),
}

# Words that belong to two topics; no held-in dataset uses them.
AMBIGUOUS = {
  'bat': ('sports', 'animals'),
  'pitch': ('sports', 'music'),
  'star': ('space', 'music'),
  'bass': ('animals', 'music'),
  'mint': ('food', 'money'),
  'dough': ('food', 'money'),
  'ray': ('animals', 'space'),
  'horn': ('animals', 'music'),
  'belt': ('sports', 'space'),
  'cup': ('sports', 'food'),
  'net': ('sports', 'money'),
  'score': ('sports', 'music'),
  'cricket': ('sports', 'animals'),
  'kiwi': ('animals', 'food'),
  'jam': ('food', 'music'),
  'note': ('music', 'money'),
}

GOOD = tuple(
  'great lovely superb brilliant pleasant wonderful charming perfect'.split()
)
BAD = tuple('awful terrible boring dreadful nasty horrible dull ugly'.split())
PRAISED = ('liked', 'loved', 'enjoyed')
BLAMED = ('hated', 'disliked', 'regretted')

MEN = tuple(
  'adam bob carl eric fred hugo ivan kyle noah oscar paul sam'.split()
)
WOMEN = tuple(
  'anna beth cora emma gina iris jane lucy maria nora olga rosa'.split()
)
PEOPLE = MEN + WOMEN
# The facts about residents never change; those about visitors hold for one
# text. So memory and reading are never at odds.
RESIDENTS = MEN[:6] + WOMEN[:6]
VISITORS = MEN[6:] + WOMEN[6:]

THINGS = tuple('book lamp chair box key clock ring pen basket mirror'.split())

RELATIONS = {
  'color': Relation(
    tuple('red blue green yellow black white brown purple'.split()),
    'likes the color',
    (
      'which color does {} like',
      'what is the favorite color of {}',
      'which color is best for {}',
    ),
  ),
  'city': Relation(
    tuple('paris london rome berlin oslo tokyo madrid cairo'.split()),
    'lives in',
    (
      'where does {} live',
      'which city is {} from',
      'what is the home town of {}',
    ),
  ),
  'drink': Relation(
    tuple('tea coffee milk juice water cocoa cider lemonade'.split()),
    'drinks',
    (
      'what does {} drink',
      'which drink does {} take',
      'what is in the glass of {}',
    ),
  ),
  'job': Relation(
    tuple('doctor teacher farmer lawyer baker pilot nurse painter'.split()),
    'works as a',
    (
      'what is the job of {}',
      'what does {} work as',
      'which trade has {}',
    ),
  ),
}
CITIES = RELATIONS['city'].values

ADJECTIVES = (
  Synonyms(('big', 'large'), 'mountain'),
  Synonyms(('small', 'little'), 'insect'),
  Synonyms(('quick', 'fast'), 'train'),
  Synonyms(('old', 'ancient'), 'castle'),
  Synonyms(('smart', 'clever'), 'student'),
  Synonyms(('quiet', 'silent'), 'library'),
)
NOUNS = (
  Synonyms(('road', 'street'), 'crossed'),
  Synonyms(('house', 'home'), 'entered'),
  Synonyms(('shop', 'store'), 'visited'),
  Synonyms(('boat', 'ship'), 'sailed'),
  Synonyms(('gift', 'present'), 'wrapped'),
  Synonyms(('stone', 'rock'), 'lifted'),
)
SYNONYMS = ADJECTIVES + NOUNS
