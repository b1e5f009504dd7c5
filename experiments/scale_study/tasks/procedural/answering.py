"""Question answering: multiple-choice, extractive and closed-book."""

import random

from experiments.scale_study.tasks.procedural import formats, lexicon, world
from experiments.scale_study.tasks.procedural.drawing import drawn
from experiments.scale_study.tasks.procedural.world import Fact
from experiments.scale_study.tasks.source import Example, Split


def _choose_by_topic(rng: random.Random) -> Example:
  topic, *wrong = rng.sample(world.TOPIC_NAMES, 3)
  if rng.random() < 0.3:
    options = tuple(world.action_of(rng, name) for name in (topic, *wrong))
    question = rng.choice(
      (f'which action is about {topic}', f'which action belongs to {topic}')
    )
  else:
    options = tuple(world.thing_of(rng, name) for name in (topic, *wrong))
    related = world.other(rng, lexicon.TOPICS[topic].things, options[0])
    question = rng.choice(
      (
        f'which one is about {topic}',
        f'which thing belongs to {topic}',
        f'which one goes with {related}',
      )
    )
  prompt = formats.ask_choice(rng, '', question, options)
  return Example(prompt, options[0], options)


def _choose_by_meaning(rng: random.Random) -> Example:
  kind = rng.randrange(3)
  if kind == 0:
    one, two, three = rng.sample(lexicon.SYNONYMS, 3)
    word, synonym = rng.sample(one.words, 2)
    options = (synonym, rng.choice(two.words), rng.choice(three.words))
    question = rng.choice(
      (f'which word means {word}', f'which word is the same as {word}')
    )
  elif kind == 1:
    good = rng.random() < 0.5
    options = (
      world.adjective(rng, good),
      *rng.sample(lexicon.BAD if good else lexicon.GOOD, 2),
    )
    question = rng.choice(
      (
        f'which word is {"positive" if good else "negative"}',
        f'how was the thing that they {world.verdict(rng, good)}',
      )
    )
  else:
    man = rng.random() < 0.5
    people, others = (
      (lexicon.MEN, lexicon.WOMEN) if man else (lexicon.WOMEN, lexicon.MEN)
    )
    options = (rng.choice(people), *rng.sample(others, 2))
    question = rng.choice(
      (
        f'which person is a {"man" if man else "woman"}',
        f'who is {"he" if man else "she"}',
        f'which one is called {"he" if man else "she"}',
      )
    )
  prompt = formats.ask_choice(rng, '', question, options)
  return Example(prompt, options[0], options)


def _extract_fact(rng: random.Random) -> Example:
  facts = world.visitor_facts(rng, 3)
  asked = rng.choice(facts)
  text = formats.passage(rng, world.tell(facts))
  return Example(
    formats.ask(rng, text, rng.choice(asked.questions)), asked.value
  )


def _extract_from_scene(rng: random.Random) -> Example:
  scene = world.scene(rng)
  questions, answer = rng.choice(
    (
      (('which man is in the text', 'who is the man', 'who is he'), scene.man),
      (
        ('which woman is in the text', 'who is the woman', 'who is she'),
        scene.woman,
      ),
      (('where was it', 'in which city was it'), scene.city),
      (('which thing is in the text', 'what was there'), scene.thing),
    )
  )
  text = formats.passage(rng, scene.text)
  return Example(formats.ask(rng, text, rng.choice(questions)), answer)


# Every fact is asked in one wording in training and in others elsewhere.
_SPLITS: dict[str, Split] = {
  question: split
  for index, fact in enumerate(world.FACTS)
  for split, question in zip(
    ('train', 'validation', 'test'),
    fact.questions[index % 3 :] + fact.questions[: index % 3],
    strict=True,
  )
}


def split_of_recall(prompt: str) -> Split:
  """Tells the split of a closed-book prompt by its fact and its wording."""
  question = prompt.removeprefix('question : ').removesuffix(' ? answer :')
  return _SPLITS[question]


def _recall(rng: random.Random, relations: tuple[str, str]) -> Example:
  fact: Fact = rng.choice(
    [fact for fact in world.FACTS if fact.relation in relations]
  )
  return Example(formats.ask(rng, '', rng.choice(fact.questions)), fact.value)


def _recall_place(rng: random.Random) -> Example:
  return _recall(rng, ('city', 'job'))


def _recall_taste(rng: random.Random) -> Example:
  return _recall(rng, ('color', 'drink'))


MULTIPLE_CHOICE = (
  drawn('choose_by_topic', 'multiple_choice_qa', _choose_by_topic),
  drawn('choose_by_meaning', 'multiple_choice_qa', _choose_by_meaning),
)
EXTRACTIVE = (
  drawn('extract_fact', 'extractive_qa', _extract_fact, metric='exact_match'),
  drawn(
    'extract_from_scene',
    'extractive_qa',
    _extract_from_scene,
    metric='exact_match',
  ),
)
CLOSED_BOOK = (
  drawn(
    'recall_place',
    'closed_book_qa',
    _recall_place,
    metric='exact_match',
    split_of=split_of_recall,
  ),
  drawn(
    'recall_taste',
    'closed_book_qa',
    _recall_taste,
    metric='exact_match',
    split_of=split_of_recall,
  ),
)
