"""The pretraining corpus: plain text in a dialogue register.

It teaches what the tasks need (what words mean, who is who, how to find, match
and restate) and none of their formats. Most words of a random world cannot be
predicted and drown the few that carry a skill. So the words of replies
(`- where was it ? - oslo .`) and of restatements (`so ivan lives in oslo .`)
weigh more in the loss.
"""

from collections.abc import Callable, Iterator, Sequence
import random
from typing import NamedTuple

from experiments.scale_study.tasks.procedural import lexicon, world
from experiments.scale_study.tasks.source import HELD_IN, HELD_OUT, Piece

REPLY_WEIGHT = 5.0

# What a heap may consist of: anything that can be named.
_PRESENT = lexicon.THINGS + lexicon.PEOPLE + lexicon.GOOD + lexicon.BAD

Document = tuple[Piece, ...]
Turn = tuple[Piece, Piece]


def _tell(text: str) -> Piece:
  return Piece(f'{text} .')


def _turn(question: str, reply: str) -> Turn:
  return Piece(f'- {question} ? -'), Piece(f'{reply} .', REPLY_WEIGHT)


def _agree(question: str, true: bool) -> Turn:
  return _turn(question, 'yes' if true else 'no')


def _restate(text: str) -> Turn:
  return Piece('so'), Piece(f'{text} .', REPLY_WEIGHT)


def _chain(opening: str, turns: list[Turn]) -> Document:
  pieces = (piece for turn in turns for piece in turn)
  return (_tell(opening), *pieces) if opening else tuple(pieces)


def _facts(rng: random.Random) -> Document:
  facts = rng.sample(world.FACTS, 4)
  return tuple(_tell(fact.sentence) for fact in facts)


def _questions_of_fact(rng: random.Random) -> Document:
  facts = rng.sample(world.FACTS, 3)
  return _chain(
    '', [_turn(rng.choice(fact.questions), fact.value) for fact in facts]
  )


def _story(rng: random.Random) -> Document:
  topic = rng.choice(world.TOPIC_NAMES)
  words = [word for word, of in lexicon.AMBIGUOUS.items() if topic in of]
  word = rng.choice(words) if rng.random() < 0.6 else None
  good = rng.random() < 0.5
  return (
    _tell(world.topic_sentence(rng, topic, word)),
    _tell(world.topic_sentence(rng, topic, word)),
    _tell(f'it was about {topic}'),
    _tell(world.opinion_sentence(rng, good)),
    _tell(world.opinion_sentence(rng, good)),
    _tell(f'it was {"good" if good else "bad"}'),
  )


def _definition(rng: random.Random) -> str:
  kind = rng.randrange(6)
  if kind == 0:
    one, two = rng.sample(rng.choice(lexicon.SYNONYMS).words, 2)
    return f'{one} means {two}'
  if kind == 1:
    good = rng.random() < 0.5
    word = rng.choice((world.adjective(rng, good), world.verdict(rng, good)))
    return f'{word} is a {"positive" if good else "negative"} word'
  if kind == 2:
    topic = rng.choice(world.TOPIC_NAMES)
    return f'the {world.thing_of(rng, topic)} belongs to {topic}'
  if kind == 3:
    name = rng.choice(lexicon.PEOPLE)
    return f'{name} is a {"man" if name in lexicon.MEN else "woman"}'
  if kind == 4:
    relation = rng.choice(tuple(lexicon.RELATIONS))
    return f'{rng.choice(lexicon.RELATIONS[relation].values)} is a {relation}'
  words, company = rng.choice(lexicon.ADJECTIVES)
  return f'the {rng.choice(words)} {company} is {rng.choice(words)}'


def _definitions(rng: random.Random) -> Document:
  return tuple(_tell(_definition(rng)) for _ in range(4))


def _talk_about_topic(rng: random.Random) -> Document:
  topic, wrong, far = rng.sample(world.TOPIC_NAMES, 3)
  one, two = rng.sample((topic, wrong), 2)
  turns = [
    _turn(f'{one} or {two}', topic),
    _turn('what was it about', topic),
    _agree(f'was it about {topic}', True),
    _agree(f'about {topic}', True),
    _agree(f'was it about {wrong}', False),
    _agree(f'about {far}', False),
  ]
  return _chain(world.topic_sentence(rng, topic), rng.sample(turns, 4))


def _talk_about_opinion(rng: random.Random) -> Document:
  good = rng.random() < 0.5
  turns = [
    _agree('was it good', good),
    _agree('was it bad', not good),
    _agree('did they like it', good),
    _agree('is that positive', good),
    _agree('is that negative', not good),
    _turn('good or bad', 'good' if good else 'bad'),
    _turn('how was it', world.adjective(rng, good)),
  ]
  return _chain(world.opinion_sentence(rng, good), rng.sample(turns, 4))


def _agreement_on_words(rng: random.Random) -> Turn:
  kind, true = rng.randrange(4), rng.random() < 0.5
  if kind == 0:
    one, two = rng.sample(lexicon.SYNONYMS, 2)
    word, synonym = rng.sample(one.words, 2)
    meaning = synonym if true else rng.choice(two.words)
    return _agree(f'is {word} the same as {meaning}', true)
  if kind == 1:
    topic, wrong = rng.sample(world.TOPIC_NAMES, 2)
    thing = world.thing_of(rng, topic)
    return _agree(f'does {thing} belong to {topic if true else wrong}', true)
  if kind == 2:
    good = rng.random() < 0.5
    claim = 'good' if good == true else 'bad'
    return _agree(f'is {world.adjective(rng, good)} {claim}', true)
  name = rng.choice(lexicon.PEOPLE)
  claim = 'man' if (name in lexicon.MEN) == true else 'woman'
  return _agree(f'is {name} a {claim}', true)


def _agree_on_words(rng: random.Random) -> Document:
  return _chain('', [_agreement_on_words(rng) for _ in range(4)])


def _pick(rng: random.Random) -> Document:
  kind = rng.randrange(4)
  if kind == 0:
    topic, wrong = rng.sample(world.TOPIC_NAMES, 2)
    right, other = world.thing_of(rng, topic), world.thing_of(rng, wrong)
    question = f'which is about {topic}'
  elif kind == 1:
    good = rng.random() < 0.5
    right, other = world.adjective(rng, good), world.adjective(rng, not good)
    question = f'which is {"good" if good else "bad"}'
  elif kind == 2:
    (one, two), pronoun, right = world.pair(rng)
    other = two if right == one else one
    noun = 'man' if pronoun == 'he' else 'woman'
    question = rng.choice((f'who is the {noun}', f'who is {pronoun}'))
  else:
    one, two = rng.sample(lexicon.SYNONYMS, 2)
    word, right = rng.sample(one.words, 2)
    other = rng.choice(two.words)
    question = f'which means {word}'
  first, second = rng.sample((right, other), 2)
  if rng.random() < 0.5:
    return _turn(f'{question} , {first} or {second}', right)
  opening = _tell(f'there is {first} and {second}')
  return (opening, *_turn(question, right))


def _pick_words(rng: random.Random) -> Document:
  return _pick(rng) + _pick(rng)


def _talk_about_things(rng: random.Random) -> Document:
  *words, absent, lost = rng.sample(_PRESENT, 5)
  there = [_agree(f'is {rng.choice(words)} there', True) for _ in range(2)]
  gone = [_agree(f'is {word} there', False) for word in (absent, lost)]
  turns = [
    *rng.sample([*there, *gone], 3),
    _turn('what is there', ' , '.join(words)),
  ]
  rng.shuffle(turns)
  return _chain(f'there is {" , ".join(words)}', turns)


def _talk_about_scene(rng: random.Random) -> Document:
  scene = world.scene(rng)
  pronoun, meant = rng.choice((('he', scene.man), ('she', scene.woman)))
  noun = 'man' if pronoun == 'he' else 'woman'
  turns = [
    _turn(f'who is {pronoun}', meant),
    _turn(f'who is the {noun}', meant),
    _turn(f'{pronoun} left . who left', meant),
    _turn('where was it', scene.city),
    _turn('what was there', scene.thing),
    _restate(f'{pronoun} , {meant} , took the {scene.thing}'),
  ]
  return _chain(scene.text, rng.sample(turns, 3))


def _talk_about_visitor(rng: random.Random) -> Document:
  facts = world.visitor_facts(rng, rng.randint(1, 3))
  chosen = rng.sample(facts, min(2, len(facts)))
  turns = (
    [_restate(world.tell(chosen))]
    if rng.random() < 0.3
    else [_turn(rng.choice(fact.questions), fact.value) for fact in chosen]
  )
  return _chain(world.tell(facts), turns)


def _notes(rng: random.Random) -> Document:
  kind = rng.randrange(3)
  if kind == 0:
    facts = world.visitor_facts(rng, 2)
    values = ' , '.join(fact.value for fact in facts)
    return _chain(
      f'{facts[0].person} , {values}', [_restate(world.tell(facts))]
    )
  topic = lexicon.TOPICS[rng.choice(world.TOPIC_NAMES)]
  person, verb = rng.choice(lexicon.PEOPLE), rng.choice(topic.verbs)
  one, two = rng.sample(topic.things, 2)
  if kind == 1:
    notes = f'{person} , {verb} , {one} , {two}'
    return _chain(
      notes, [_restate(f'{person} {verb} the {one} with the {two}')]
    )
  adjective = world.adjective(rng, rng.random() < 0.5)
  text = f'{person} {verb} the {adjective} {one} near the {two}'
  return _chain(text, [_restate(f'{person} {verb} the {one}')])


def _other_words(rng: random.Random) -> Document:
  said = world.concept(rng)
  forms = (world.deed, world.sight, world.possessed)
  turns = []
  for form in rng.choices(forms, k=3):
    true = rng.random() < 0.5
    claim = said if true else world.contradict(rng, said)
    turns.append(_agree(f'so {form(rng, claim)}', true))
  return _chain(rng.choice(forms)(rng, said), turns)


def _compared(rng: random.Random) -> Document:
  forms = (world.deed, world.sight, world.possessed)
  said, true = world.concept(rng), rng.random() < 0.5
  again = said if true else world.contradict(rng, said)
  return (
    _tell(rng.choice(forms)(rng, said)),
    _tell(rng.choice(forms)(rng, again)),
    *_agree(rng.choice(('one thing', 'said twice')), true),
  )


def _compare(rng: random.Random) -> Document:
  return _compared(rng) + _compared(rng)


class _Kind(NamedTuple):
  """A kind of document.

  Attributes:
    draw: generates one.
    frequency: how often, relative to other kinds.
    teaches: categories that need what it teaches.
  """

  draw: Callable[[random.Random], Document]
  frequency: float
  teaches: tuple[str, ...]


_CHOICE, _EXTRACTIVE, _CLOSED_BOOK, _SENTIMENT = HELD_IN[:4]
_TOPIC, _STRUCTURE, _SUMMARY, _PARAPHRASE = HELD_IN[4:]
_KINDS = (
  _Kind(_facts, 2.0, (_CLOSED_BOOK,)),
  _Kind(_questions_of_fact, 3.5, (_CLOSED_BOOK,)),
  _Kind(_story, 2.5, HELD_OUT),
  _Kind(_definitions, 3.0, (_CHOICE, _PARAPHRASE)),
  _Kind(_talk_about_topic, 2.0, (_TOPIC,)),
  _Kind(_talk_about_opinion, 2.0, (_SENTIMENT,)),
  _Kind(_pick_words, 3.0, (_CHOICE,)),
  _Kind(_talk_about_things, 2.0, (_EXTRACTIVE, _PARAPHRASE)),
  _Kind(_talk_about_scene, 2.0, (_EXTRACTIVE,)),
  _Kind(_talk_about_visitor, 3.0, (_EXTRACTIVE, _STRUCTURE, _SUMMARY)),
  _Kind(_notes, 2.0, (_STRUCTURE, _SUMMARY)),
  _Kind(_other_words, 3.0, (_PARAPHRASE,)),
  _Kind(_compare, 3.0, (_PARAPHRASE,)),
  _Kind(_agree_on_words, 2.5, (_CHOICE, _PARAPHRASE)),
)


def documents(
  seed: int, categories: Sequence[str] = HELD_IN + HELD_OUT
) -> Iterator[Document]:
  """Yields documents forever, the same for the same seed.

  Args:
    seed: of what is drawn.
    categories: those for which the corpus prepares.
  """
  rng = random.Random(f'corpus/{seed}')
  kinds = [kind for kind in _KINDS if set(kind.teaches) & set(categories)]
  frequencies = [kind.frequency for kind in kinds]
  while True:
    (kind,) = rng.choices(kinds, frequencies)
    yield kind.draw(rng)
