"""Writing: structure-to-text and summarization."""

import random

from experiments.scale_study.tasks.procedural import formats, lexicon, world
from experiments.scale_study.tasks.procedural.drawing import drawn
from experiments.scale_study.tasks.source import Example


def _describe_attributes(rng: random.Random) -> Example:
  facts = world.visitor_facts(rng, 2)
  fields = ' ; '.join(f'{fact.relation} : {fact.value}' for fact in facts)
  prompt = formats.instruct(
    rng,
    (
      'data : name : {} ; {} . describe the data .',
      'write about the facts : name : {} ; {} .',
      'name : {} ; {} . turn this into text .',
    ),
    facts[0].person,
    fields,
  )
  return Example(prompt, world.tell(facts))


def _sentence_of_keywords(rng: random.Random) -> Example:
  topic = lexicon.TOPICS[rng.choice(world.TOPIC_NAMES)]
  person, verb = rng.choice(lexicon.PEOPLE), rng.choice(topic.verbs)
  one, two = rng.sample(topic.things, 2)
  prompt = formats.instruct(
    rng,
    (
      'words : {} . write a sentence with the words .',
      'make a sentence from : {} .',
      'keys : {} .',
    ),
    f'{person} , {verb} , {one} , {two}',
  )
  return Example(prompt, f'{person} {verb} the {one} with the {two}')


def _headline(rng: random.Random) -> Example:
  topic = lexicon.TOPICS[rng.choice(world.TOPIC_NAMES)]
  person, verb = rng.choice(lexicon.PEOPLE), rng.choice(topic.verbs)
  one, two = rng.sample(topic.things, 2)
  adjective = world.adjective(rng, rng.random() < 0.5)
  city = rng.choice(lexicon.CITIES)
  text = rng.choice(
    (
      f'in {city} {person} {verb} the very {adjective} {one} near the {two}',
      f'then {person} {verb} the new {one} with the {two} . it was {adjective}',
      f'{person} {verb} the {adjective} {one} and everyone saw the {two}',
    )
  )
  prompt = formats.instruct(
    rng,
    (
      '{}summarize this .',
      'write a title for the {}',
      '{}write a short headline .',
    ),
    formats.passage(rng, text),
  )
  return Example(prompt, f'{person} {verb} the {one}')


def _note_about_person(rng: random.Random) -> Example:
  (fact,) = world.visitor_facts(rng, 1)
  aside = world.topic_sentence(rng, rng.choice(world.TOPIC_NAMES))
  text = rng.choice(
    (
      f'hello said {rng.choice(lexicon.RESIDENTS)} . {fact.sentence} . {aside}',
      f'{aside} . {fact.sentence}',
      f'they know that {fact.sentence} . {aside}',
    )
  )
  prompt = formats.instruct(
    rng,
    (
      '{}summarize what we know about {} .',
      '{}write a short note about {} .',
      'dialogue : {}who is {} ?',
    ),
    formats.passage(rng, text),
    fact.person,
  )
  return Example(prompt, fact.sentence)


STRUCTURE_TO_TEXT = (
  drawn(
    'describe_attributes',
    'structure_to_text',
    _describe_attributes,
    metric='rouge_l',
  ),
  drawn(
    'sentence_of_keywords',
    'structure_to_text',
    _sentence_of_keywords,
    metric='rouge_l',
  ),
)
SUMMARIZATION = (
  drawn('headline', 'summarization', _headline, metric='rouge_l'),
  drawn(
    'note_about_person',
    'summarization',
    _note_about_person,
    metric='rouge_l',
  ),
)
