"""The held-out tasks: what no expert is trained on.

Each pairs a skill with an answer format that different held-in categories own,
as the comments say; none needs a word or a fact of its own.
"""

import random

from experiments.scale_study.tasks.procedural import formats, lexicon, world
from experiments.scale_study.tasks.procedural.drawing import drawn
from experiments.scale_study.tasks.source import Example

_YES_NO = formats.YES_NO

_ENDINGS = (
  'which ending is best',
  'what comes next',
  'how does it end',
)


def _story(rng: random.Random, text: str) -> str:
  frame = rng.choice(('story : {} . ', 'complete the story : {} . ', '{} . '))
  return frame.format(text)


# Topic classification, with the choice of multiple-choice QA.
def _end_of_story(rng: random.Random) -> Example:
  topic, wrong = rng.sample(world.TOPIC_NAMES, 2)
  options = (world.action_of(rng, topic), world.action_of(rng, wrong))
  person = rng.choice(lexicon.PEOPLE)
  text = f'{world.topic_sentence(rng, topic)} . then {person}'
  prompt = formats.ask_choice(
    rng, _story(rng, text), rng.choice(_ENDINGS), options
  )
  return Example(prompt, options[0], options)


# Sentiment, with the choice of multiple-choice QA.
def _end_of_reason(rng: random.Random) -> Example:
  good = rng.random() < 0.5
  options = (world.adjective(rng, good), world.adjective(rng, not good))
  who = rng.choice((*lexicon.PEOPLE, 'they', 'everyone'))
  thing = rng.choice((*lexicon.THINGS, *lexicon.TOPICS['food'].things))
  text = f'{who} {world.verdict(rng, good)} the {thing} because it was'
  prompt = formats.ask_choice(
    rng, _story(rng, text), rng.choice(_ENDINGS), options
  )
  return Example(prompt, options[0], options)


# The comparison of paraphrase identification, after dropping a detail as in
# summarization.
def _entailment_of_words(rng: random.Random) -> Example:
  premise = world.concept(rng)
  true = rng.random() < 0.5
  hypothesis = premise if true else world.contradict(rng, premise)
  detail = rng.choice((f' in {rng.choice(lexicon.CITIES)}', ' again', ''))
  frame = rng.choice(
    (
      'premise : {} . hypothesis : {} . ',
      'given that {} . {} . ',
      'we know that {} . claim : {} . ',
    )
  )
  text = frame.format(
    world.deed(rng, premise) + detail, world.sight(rng, hypothesis)
  )
  question = rng.choice(
    ('does this follow', 'can we conclude this', 'is the claim true')
  )
  prompt = formats.ask_yes_no(rng, text, question)
  return Example(prompt, _YES_NO[not true], _YES_NO)


# Sentiment or topic classification, as a claim that is true or not.
def _entailment_of_gist(rng: random.Random) -> Example:
  true = rng.random() < 0.5
  if rng.random() < 0.5:
    good = rng.random() < 0.5
    premise = world.opinion_sentence(rng, good)
    claimed = good if true else not good
    claim = rng.choice(
      (
        f'it was {"good" if claimed else "bad"}',
        f'the review is {"positive" if claimed else "negative"}',
      )
    )
  else:
    topic, wrong = rng.sample(world.TOPIC_NAMES, 2)
    premise = world.topic_sentence(rng, topic)
    claim = f'this is about {topic if true else wrong}'
  frame = rng.choice(
    ('premise : {} . ', 'given that {} . ', 'we know that {} . ')
  )
  question = rng.choice(
    (
      'can we conclude that {}',
      'does it follow that {}',
      'is it true that {}',
    )
  )
  prompt = formats.ask_yes_no(
    rng, frame.format(premise), question.format(claim)
  )
  return Example(prompt, _YES_NO[not true], _YES_NO)


# Who is a man or a woman, as in extractive and multiple-choice QA.
def _who_in_a_reason(rng: random.Random) -> Example:
  (one, two), pronoun, meant = world.pair(rng)
  thing = rng.choice(lexicon.THINGS)
  adjective = world.adjective(rng, rng.random() < 0.5)
  text = rng.choice(
    (
      f'{one} gave the {thing} to {two} because {pronoun} was {adjective}',
      f'{one} met {two} because {pronoun} was in {rng.choice(lexicon.CITIES)}',
    )
  )
  question = rng.choice(
    (
      f'who does {pronoun} refer to',
      f'who is meant by {pronoun}',
      f'what does the word {pronoun} mean',
    )
  )
  prompt = formats.ask_choice(
    rng, formats.passage(rng, text), question, (one, two)
  )
  return Example(prompt, meant, (one, two))


def _who_acted(rng: random.Random) -> Example:
  (one, two), pronoun, meant = world.pair(rng)
  verb = rng.choice(('saw', 'took', 'lost'))
  thing = rng.choice(lexicon.THINGS)
  text = (
    f'{one} and {two} were in {rng.choice(lexicon.CITIES)} . '
    f'then {pronoun} {verb} the {thing}'
  )
  question = rng.choice(
    (f'who {verb} the {thing}', f'who does {pronoun} refer to')
  )
  prompt = formats.ask_choice(
    rng, formats.passage(rng, text), question, (one, two)
  )
  return Example(prompt, meant, (one, two))


# The topic of the company that a word keeps.
def _sense_of_word(rng: random.Random) -> Example:
  word = rng.choice(tuple(lexicon.AMBIGUOUS))
  senses = lexicon.AMBIGUOUS[word]
  sense = rng.choice(senses)
  text = world.topic_sentence(rng, sense, word)
  question = rng.choice(
    (
      f'what does {word} mean here',
      f'which sense of {word} is it',
      f'in which sense is {word} used',
    )
  )
  prompt = formats.ask_choice(rng, formats.passage(rng, text), question, senses)
  return Example(prompt, sense, senses)


COMPLETION = (
  drawn('end_of_story', 'sentence_completion', _end_of_story),
  drawn('end_of_reason', 'sentence_completion', _end_of_reason),
)
INFERENCE = (
  drawn(
    'entailment_of_words', 'natural_language_inference', _entailment_of_words
  ),
  drawn(
    'entailment_of_gist', 'natural_language_inference', _entailment_of_gist
  ),
)
COREFERENCE = (
  drawn('who_in_a_reason', 'coreference_resolution', _who_in_a_reason),
  drawn('who_acted', 'coreference_resolution', _who_acted),
)
WORD_SENSE = (
  drawn('sense_of_word', 'word_sense_disambiguation', _sense_of_word),
)
