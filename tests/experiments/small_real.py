"""What the real tasks are made of, in small: words, texts and a tokenizer."""

import itertools
import json

import tokenizers

from experiments.scale_study import gguf_file, smollm2
from experiments.scale_study.tasks.wordnet.database import (
  Database,
  Key,
  Synset,
)
from tests.experiments import small_gguf

SUBJECTS = ('animal', 'food', 'person', 'plant', 'time')
TOPICS = ('games', 'graphics', 'mail', 'science', 'sound')
# Each in two senses, of which the second is of the next subject.
WORDS = {
  f'{subject[:2]}{first}{second}': subject
  for subject in SUBJECTS
  for first, second in itertools.product('bdfgk', 'aeiou')
}


# What the questions consist of, so that they are short.
_ASKED = """user assistant Is this review or negative? What is about: Which word
means "What is meant by does mean in Write a sentence. Here, Answer: my old town
i see the film good bad tool ": "? ing Sum up Does no It kind field unlike yes
long tale about"""


def next_subject(subject: str) -> str:
  """The subject of a word's second sense."""
  return SUBJECTS[(SUBJECTS.index(subject) + 1) % len(SUBJECTS)]


def kind(word: str) -> str:
  """The kind of a word's first sense."""
  return f'{word[:3]}kind'


def database() -> Database:
  """A WordNet in which a word with y or z behind it is a synonym.

  Of the first sense of `word` is `wordy`, in 'by wording town i see the word';
  of the second `wordz`, in 'my word is old'. In its first sense it is a kind of
  what its first three letters and 'kind' name.
  """
  offsets = map(str, itertools.count())
  kinds = {
    name: Synset(Key('n', next(offsets)), '', (name,), name, (), (), ())
    for name in dict.fromkeys(map(kind, WORDS))
  }
  synsets, senses = {synset.key: synset for synset in kinds.values()}, {}
  for word, subject in WORDS.items():
    first = Synset(
      key=Key('n', next(offsets)),
      subject=subject,
      words=(word, f'{word}y'),
      definition=f'{subject} of {word[-2:]}',
      examples=(f'by {word}ing town i see the {word}',),
      hypernyms=(kinds[kind(word)].key,),
      antonyms=(),
    )
    second = Synset(
      key=Key('n', next(offsets)),
      subject=next_subject(subject),
      words=(word, f'{word}z'),
      definition=f'other than {word[-2:]}',
      examples=(f'my {word} is old', f'long tale about {word} town'),
      hypernyms=(),
      antonyms=(),
    )
    synsets |= {first.key: first, second.key: second}
    senses[word, 'n'] = first, second
  return Database(synsets, senses, frozenset(senses))


def sentences() -> str:
  """Lines of rated sentences: those with an even number are good."""
  return '\n'.join(
    f'{n}\t{(-1) ** n * 2.5}\tfilm {n} is {"bad" if n % 2 else "good"}'
    for n in range(100)
  )


def descriptions() -> str:
  """Records of packages: each says what it is about, and has a variant."""
  return '\n\n'.join(
    f'Package: p{n}\nSection: {topic}\nDescription: {topic} tool {n}{variant}'
    for topic in TOPICS
    for n in range(40)
    for variant in ('', ' (data files)', ' - server')
  )


def write_model(path) -> None:
  """Writes a random model in which every word of the tasks is one token."""
  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(False)
  learned = [f'{word}{end}' for word in WORDS for end in ('', 'y', 'z')]
  learned += [*SUBJECTS, *TOPICS, *map(kind, WORDS), *_ASKED.split()]
  learned += ['positive', 'negative']
  tokenizer.train_from_iterator(
    [*(f' {word}' for word in learned), *_ASKED.split()],
    tokenizers.trainers.BpeTrainer(
      vocab_size=5000,
      special_tokens=list(small_gguf.SPECIAL),
      initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
    ),
  )
  ids = tokenizer.get_vocab()
  merges = json.loads(tokenizer.to_str())['model']['merges']
  small_gguf.write(path, sorted(ids, key=ids.get), map(' '.join, merges))


def write_cache(folder) -> None:
  """Fills a cache with what would be fetched."""
  folder.mkdir(parents=True)
  (folder / 'movie_sentences.txt').write_text(sentences())
  (folder / 'debian.txt').write_text(descriptions())
  write_model(folder / 'model.gguf')
  gguf_file.write_hugging_face(folder / 'model.gguf', folder / smollm2.NAME)
