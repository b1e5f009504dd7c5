"""The pretraining corpus: plain text in a dialogue register.

Most words of a random world cannot be predicted and drown the few that carry
a skill. The words of replies (`- where was it ? - oslo .`) and of restatements
(`so ivan lives in oslo .`) therefore weigh more in the loss.
"""

from collections.abc import Iterator
import random
from typing import NamedTuple

from experiments.scale_study.tasks import world

REPLY_WEIGHT = 10.0


class WeightedText(NamedTuple):
  """Words of a document and the weight of each in the loss."""

  words: list[str]
  weights: list[float]


def _dialogue(rng: random.Random, text: str, *turns: str) -> str:
  chosen = rng.sample(turns, 2)
  return f'{text} . {" ".join(chosen)}'


def _talk_about_topic(rng: random.Random) -> str:
  topic, wrong = rng.sample(tuple(world.TOPICS), 2)
  one, two = rng.sample((topic, wrong), 2)
  return _dialogue(
    rng,
    world.topic_sentence(rng, topic),
    f'- {one} or {two} ? - {topic} .',
    f'- what was it about ? - {topic} .',
    f'- so it was about {topic} ? - yes .',
    f'- so it was about {wrong} ? - no .',
  )


def _talk_about_opinion(rng: random.Random) -> str:
  positive = rng.random() < 0.5
  yes, no = ('yes', 'no') if positive else ('no', 'yes')
  adjective = rng.choice(world.POSITIVE if positive else world.NEGATIVE)
  return _dialogue(
    rng,
    world.opinion_sentence(rng, positive),
    f'- was it good ? - {yes} .',
    f'- was it bad ? - {no} .',
    f'- good or bad ? - {"good" if positive else "bad"} .',
    f'- how was it ? - {adjective} .',
  )


def _talk_about_scene(rng: random.Random) -> str:
  scene = world.scene(rng)
  return _dialogue(
    rng,
    scene.text,
    f'- who is he ? - {scene.man} .',
    f'- who is she ? - {scene.woman} .',
    f'- which city ? - {scene.city} .',
    f'- which thing ? - {scene.thing} .',
  )


def _talk_about_person(rng: random.Random) -> str:
  person, facts = world.facts(rng)
  turns = (
    f'- {world.question_about(rng, person, relation)} ? - {value} .'
    for relation, value in facts.items()
  )
  return _dialogue(rng, world.fact_sentence(person, facts), *turns)


def _restate_person(rng: random.Random) -> str:
  person, facts = world.facts(rng)
  shuffled = dict(rng.sample(list(facts.items()), len(facts)))
  return (
    f'{world.fact_sentence(person, facts)} . '
    f'so {world.fact_sentence(person, shuffled)} .'
  )


def _write_out_notes(rng: random.Random) -> str:
  topic = world.TOPICS[rng.choice(tuple(world.TOPICS))]
  person, verb = rng.choice(world.PEOPLE), rng.choice(topic.verbs)
  one, two = rng.sample(topic.things, 2)
  return (
    f'{person} , {verb} , {one} , {two} . '
    f'so {person} {verb} the {one} with the {two} .'
  )


_DOCUMENTS = (
  _talk_about_topic,
  _talk_about_opinion,
  _talk_about_scene,
  _talk_about_person,
  _restate_person,
  _write_out_notes,
)


def weigh(text: str) -> WeightedText:
  """Gives words of replies and restatements `REPLY_WEIGHT`, the rest 1."""
  words, weights = text.split(), []
  inside = False
  for before, word in zip(['', *words], words, strict=False):
    weights.append(REPLY_WEIGHT if inside else 1.0)
    opens = (before, word) in (('?', '-'), ('.', 'so'))
    inside = opens or (inside and word != '.')
  return WeightedText(words, weights)


def documents(seed: int) -> Iterator[WeightedText]:
  """Yields documents forever, the same for the same seed."""
  rng = random.Random(f'corpus/{seed}')
  while True:
    yield weigh(rng.choice(_DOCUMENTS)(rng))
