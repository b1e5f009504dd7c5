"""The held-in categories: what the experts are trained on, two datasets each.

Answers that are chosen are balanced: no constant answer beats chance by more
than the noise of the draw.
"""

import random

from experiments.scale_study.tasks import formats, world
from experiments.scale_study.tasks.dataset import Dataset, Example


def _sentiment_label(rng: random.Random) -> Example:
  positive = rng.random() < 0.5
  text = formats.passage(rng, world.opinion_sentence(rng, positive))
  labels = ('positive', 'negative')
  question = rng.choice(
    (
      'what is the opinion',
      'how does the writer feel',
      'which label fits the review',
    )
  )
  prompt = formats.ask_choice(rng, text, question, labels)
  return Example(prompt, labels[not positive], labels)


def _sentiment_yes_no(rng: random.Random) -> Example:
  positive = rng.random() < 0.5
  text = formats.passage(rng, world.opinion_sentence(rng, positive))
  question, true = rng.choice(
    (
      ('does the writer like it', positive),
      ('is the review positive', positive),
      ('was it good', positive),
      ('was it bad', not positive),
    )
  )
  prompt = formats.ask_yes_no(rng, text, question)
  return Example(prompt, formats.YES_NO[not true], formats.YES_NO)


_TOPIC_QUESTIONS = (
  'what is the topic',
  'what is the text about',
  'which subject is it',
)


def _topic_label(rng: random.Random) -> Example:
  topic = rng.choice(tuple(world.TOPICS))
  text = formats.passage(rng, world.topic_sentence(rng, topic))
  prompt = formats.ask(rng, text, rng.choice(_TOPIC_QUESTIONS))
  return Example(prompt, topic, tuple(world.TOPICS))


def _topic_choice(rng: random.Random) -> Example:
  topic, wrong = rng.sample(tuple(world.TOPICS), 2)
  text = formats.passage(rng, world.topic_sentence(rng, topic))
  question = rng.choice(_TOPIC_QUESTIONS)
  prompt = formats.ask_choice(rng, text, question, (topic, wrong))
  return Example(prompt, topic, (topic, wrong))


def _facts_of_a_person(rng: random.Random) -> Example:
  person, facts = world.facts(rng)
  text = formats.passage(rng, world.fact_sentence(person, facts))
  relation, answer = rng.choice(list(facts.items()))
  question = world.question_about(rng, person, relation)
  prompt = formats.ask(rng, text, question)
  return Example(prompt, answer, world.RELATIONS[relation].values)


def _roles_in_a_scene(rng: random.Random) -> Example:
  scene = world.scene(rng)
  question, answer, candidates = rng.choice(
    (
      ('who is the man', scene.man, world.MEN),
      ('who is the woman', scene.woman, world.WOMEN),
      ('in which city was it', scene.city, world.CITIES),
      ('where was it', scene.city, world.CITIES),
      ('which thing is in the text', scene.thing, world.THINGS),
      ('what was there', scene.thing, world.THINGS),
    )
  )
  prompt = formats.ask(rng, formats.passage(rng, scene.text), question)
  return Example(prompt, answer, candidates)


def _describe_attributes(rng: random.Random) -> Example:
  person, facts = world.facts(rng)
  fields = ' ; '.join(map(' : '.join, facts.items()))
  frame = rng.choice(
    (
      'data : name : {} ; {} . describe the data . answer :',
      'write about the facts : name : {} ; {} . answer :',
      'name : {} ; {} . turn this into text . answer :',
    )
  )
  return Example(
    frame.format(person, fields), world.fact_sentence(person, facts)
  )


def _sentence_of_keywords(rng: random.Random) -> Example:
  topic = world.TOPICS[rng.choice(tuple(world.TOPICS))]
  person, verb = rng.choice(world.PEOPLE), rng.choice(topic.verbs)
  one, two = rng.sample(topic.things, 2)
  frame = rng.choice(
    (
      'words : {} . write a sentence with the words . answer :',
      'make a sentence from : {} . answer :',
      'keys : {} . answer :',
    )
  )
  keywords = ' , '.join((person, verb, one, two))
  return Example(
    frame.format(keywords), f'{person} {verb} the {one} with the {two}'
  )


HELD_IN = {
  'sentiment': (
    Dataset('sentiment_label', _sentiment_label),
    Dataset('sentiment_yes_no', _sentiment_yes_no),
  ),
  'topic': (
    Dataset('topic_label', _topic_label),
    Dataset('topic_choice', _topic_choice),
  ),
  'extractive_qa': (
    Dataset('facts_of_a_person', _facts_of_a_person),
    Dataset('roles_in_a_scene', _roles_in_a_scene),
  ),
  'structure_to_text': (
    Dataset('describe_attributes', _describe_attributes),
    Dataset('sentence_of_keywords', _sentence_of_keywords),
  ),
}
