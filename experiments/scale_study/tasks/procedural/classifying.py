"""Classification: sentiment, topic, and paraphrase identification."""

import random

from experiments.scale_study.tasks.procedural import formats, world
from experiments.scale_study.tasks.procedural.drawing import drawn
from experiments.scale_study.tasks.source import Example

_YES_NO = formats.YES_NO
_POLARITY = ('positive', 'negative')


def _sentiment_label(rng: random.Random) -> Example:
  good = rng.random() < 0.5
  text = formats.passage(rng, world.opinion_sentence(rng, good))
  question = rng.choice(
    (
      'is this positive or negative',
      'what is the opinion',
      'how does the writer feel',
    )
  )
  prompt = formats.ask_choice(rng, text, question, _POLARITY)
  return Example(prompt, _POLARITY[not good], _POLARITY)


def _sentiment_yes_no(rng: random.Random) -> Example:
  good = rng.random() < 0.5
  text = world.opinion_sentence(rng, good)
  if rng.random() < 0.4:
    topic = rng.choice(world.TOPIC_NAMES)
    text = f'{world.topic_sentence(rng, topic)} . {text}'
  question, true = rng.choice(
    (
      ('does the writer like it', good),
      ('is the writer unhappy', not good),
      ('is the review positive', good),
      ('is the review negative', not good),
      ('was it good', good),
      ('was it bad', not good),
    )
  )
  prompt = formats.ask_yes_no(rng, formats.passage(rng, text), question)
  return Example(prompt, _YES_NO[not true], _YES_NO)


def _text_about(rng: random.Random, topic: str) -> str:
  sentences = [world.topic_sentence(rng, topic)]
  if rng.random() < 0.5:
    sentences.append(world.topic_sentence(rng, topic))
  return formats.passage(rng, ' . '.join(sentences))


_TOPIC_QUESTIONS = (
  'what is the topic',
  'what is this about',
  'which subject is it',
)


def _topic_label(rng: random.Random) -> Example:
  topic = rng.choice(world.TOPIC_NAMES)
  text = _text_about(rng, topic)
  prompt = formats.ask(rng, text, rng.choice(_TOPIC_QUESTIONS))
  return Example(prompt, topic, world.TOPIC_NAMES)


def _topic_choice(rng: random.Random) -> Example:
  topic, wrong = rng.sample(world.TOPIC_NAMES, 2)
  text = _text_about(rng, topic)
  if rng.random() < 0.5:
    question = rng.choice(_TOPIC_QUESTIONS)
    options = (topic, wrong)
    prompt = formats.ask_choice(rng, text, question, options)
    return Example(prompt, topic, options)
  true = rng.random() < 0.5
  question = f'is this about {topic if true else wrong}'
  prompt = formats.ask_yes_no(rng, text, question)
  return Example(prompt, _YES_NO[not true], _YES_NO)


_SAME = (
  'do both sentences mean the same',
  'do they mean the same thing',
  'is this a paraphrase',
  'does this say the same',
)


def _paraphrase_of_sentence(rng: random.Random) -> Example:
  one = world.concept(rng)
  same = rng.random() < 0.5
  two = one if same else world.contradict(rng, one)
  frame = rng.choice(
    (
      'first : {} . second : {} . ',
      'sentence : {} . sentence : {} . ',
      '{} . {} . ',
    )
  )
  text = frame.format(world.deed(rng, one), world.deed(rng, two))
  prompt = formats.ask_yes_no(rng, text, rng.choice(_SAME))
  return Example(prompt, _YES_NO[not same], _YES_NO)


def _paraphrase_of_question(rng: random.Random) -> Example:
  one = world.concept(rng)
  same = rng.random() < 0.5
  two = one if same else world.contradict(rng, one)
  frame = rng.choice(('first : {} . second : {} . ', '{} . {} . '))
  search = rng.choice(('where is', 'i look for', 'in which place is'))
  text = frame.format(
    f'where is {world.possessed(rng, one)}',
    f'{search} {world.possessed(rng, two)}',
  )
  prompt = formats.ask_yes_no(rng, text, rng.choice(_SAME))
  return Example(prompt, _YES_NO[not same], _YES_NO)


SENTIMENT = (
  drawn('sentiment_label', 'sentiment', _sentiment_label),
  drawn('sentiment_yes_no', 'sentiment', _sentiment_yes_no),
)
TOPIC = (
  drawn('topic_label', 'topic_classification', _topic_label),
  drawn('topic_choice', 'topic_classification', _topic_choice),
)
PARAPHRASE = (
  drawn(
    'paraphrase_of_sentence',
    'paraphrase_identification',
    _paraphrase_of_sentence,
  ),
  drawn(
    'paraphrase_of_question',
    'paraphrase_identification',
    _paraphrase_of_question,
  ),
)
