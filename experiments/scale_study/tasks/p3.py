"""A folder of JSON lines in the schema of P3: your own data, or an export.

The folder, and folders in it, hold `train.jsonl`, `validation.jsonl` and
`test.jsonl`. Hidden folders are not read, and JSON lines of another name are an
error. Every line is an object:

  {"inputs": "the prompt", "targets": "the answer",
   "answer_choices": ["the answer", "another"], "category": "sentiment",
   "dataset": "imdb", "template": "Movie Expressed Sentiment"}

`answer_choices` is null or empty where the answer is free text, else two texts
or more. White space at the edges of texts is left out, and a space stands
between a prompt and what follows it. Whose prompt is, word for word, a test or
validation prompt of any dataset is not trained on. `category` is one of
`source.HELD_IN` and `source.HELD_OUT`, or `instruction`. A held-in dataset
needs all three files, a held-out one `test.jsonl`, one for instruction
`train.jsonl`. Where a dataset of a held-out category has no `train.jsonl`, no
model is trained on that category directly, and no gate asks whether it can be
learned. Texts for pretraining, if any, are lines {"text": "..."} of
`corpus.jsonl`; nobody looks whether they answer test questions.
`experiments/tools/export_p3.py` writes such a folder from P3 itself (Sanh et
al., 2021, arXiv 2110.08207).
"""

import collections
from collections.abc import Iterable, Iterator, Mapping, Sequence
import functools
import itertools
from pathlib import Path
import random
import typing
from typing import Any

from absl import logging

from experiments.scale_study.tasks import guessing, json_lines
from experiments.scale_study.tasks.source import (
  Dataset,
  Example,
  HELD_IN,
  HELD_OUT,
  INSTRUCTION,
  Metric,
  Piece,
  Source,
  Split,
)
from experiments.scale_study.tasks.tokenizer import spaced, Tokenizer, words_of

SPLITS: tuple[Split, ...] = typing.get_args(Split)

# Texts to be written, not found: near misses count.
_WRITTEN = ('structure_to_text', 'summarization')

# Examples by (category, dataset) and split.
_Examples = dict[tuple[str, str], dict[Split, list[Example]]]


def source(folder: str | Path, *, vocabulary: int = 8192) -> Source:
  """Reads a folder.

  Args:
    folder: holds the files that the head of this module describes.
    vocabulary: how many of the most frequent words of the training files get an
      id of their own; the others are spelled in bytes.

  Raises:
    ValueError: if there is no data, a line is not as described, or a dataset
      lacks a file that it needs.
  """
  folder = Path(folder)
  examples = _read(folder)
  held_in, held_out, instruction = {}, {}, []
  for category in json_lines.CATEGORIES:
    datasets = tuple(
      _dataset(name, category, splits)
      for (of, name), splits in examples.items()
      if of == category
    )
    if category == INSTRUCTION:
      instruction += datasets
    elif datasets:
      (held_in if category in HELD_IN else held_out)[category] = datasets
  texts = (
    f'{example.prompt} {example.answer}'
    for splits in examples.values()
    for example in splits.get('train', [])
  )
  return Source(
    held_in=held_in,
    held_out=held_out,
    instruction=tuple(instruction),
    corpus=functools.partial(_corpus, folder / 'corpus.jsonl'),
    tokenizer=Tokenizer(_frequent_words(texts, vocabulary), spell=True),
    corpus_file=folder / 'corpus.jsonl',
  )


def _read(folder: Path) -> _Examples:
  files: list[tuple[Split, Path]] = [
    (split, path)
    for split in SPLITS
    for path in _files(folder)
    if path.stem == split
  ]
  if not files:
    raise ValueError(
      f'{folder} has no {", ".join(f"{split}.jsonl" for split in SPLITS)}, '
      'neither itself nor in its folders. Write them as the head of '
      'experiments/scale_study/tasks/p3.py says, or with '
      'experiments/tools/export_p3.py.'
    )
  examples: _Examples = {}
  categories: dict[str, str] = {}
  for split, path in files:
    for record, where in json_lines.records(path):
      category, name, example = json_lines.example(record, where)
      if categories.setdefault(name, category) != category:
        raise ValueError(
          f'{where}: the dataset {name!r} is of {category} here and of '
          f'{categories[name]} before. A dataset has one category.'
        )
      splits = examples.setdefault((category, name), {})
      splits.setdefault(split, []).append(example)
  for (category, name), splits in examples.items():
    _require(splits, category, name)
  _keep_apart(examples)
  return examples


def _files(folder: Path) -> Sequence[Path]:
  """Finds what is to be read; hidden folders have copies, as of notebooks."""
  found = [
    path
    for path in sorted(folder.rglob('*.jsonl'))
    if not any(name.startswith('.') for name in path.relative_to(folder).parts)
  ]
  unknown = [
    f'{path}'
    for path in found
    if path.stem not in SPLITS and path != folder / 'corpus.jsonl'
  ]
  if unknown:
    raise ValueError(
      f'{", ".join(unknown)}: such a file is not read. Call it '
      f'{", ".join(f"{split}.jsonl" for split in SPLITS)} or, in {folder} '
      'itself, corpus.jsonl; or put it elsewhere.'
    )
  return found


def _require(splits: Mapping[Split, Any], category: str, name: str) -> None:
  needed: Sequence[Split] = (
    SPLITS
    if category in HELD_IN
    else ('test',)
    if category in HELD_OUT
    else ('train',)
  )
  for split in needed:
    if split not in splits:
      raise ValueError(
        f'The dataset {name!r} of {category} has no {split} examples, only '
        f'{", ".join(splits)}. Put some of them into {split}.jsonl'
        + (
          ': merge hyperparameters are chosen on them.'
          if split == 'validation'
          else '.'
        )
      )


def _keep_apart(examples: _Examples) -> None:
  """Leaves a prompt that is in several splits, of any data, to the last."""
  seen: set[str] = set()
  for split in reversed(SPLITS):
    there_are = {
      name: splits for (_, name), splits in examples.items() if split in splits
    }
    for name, splits in there_are.items():
      kept = [one for one in splits[split] if spaced(one.prompt) not in seen]
      if not kept:
        raise ValueError(
          f'All {split} prompts of the dataset {name!r} are test or validation '
          'prompts as well, of this dataset or another. Divide the data anew.'
        )
      if len(kept) < len(splits[split]):
        logging.warning(
          '%s: left out %d of %d %s examples, whose prompts are test or '
          'validation prompts as well, of this dataset or another.',
          name,
          len(splits[split]) - len(kept),
          len(splits[split]),
          split,
        )
      splits[split] = kept
      if split != 'train':
        _warn_of_contradictions(kept, name, split)
    # Only now: datasets of one split may share their prompts.
    for splits in there_are.values():
      seen.update(spaced(example.prompt) for example in splits[split])


def _warn_of_contradictions(
  examples: Iterable[Example], name: str, split: Split
) -> None:
  """Says how many answers are lost, as a prompt is asked about once."""
  answered = {(example.prompt, example.answer) for example in examples}
  lost = len(answered) - len({prompt for prompt, _ in answered})
  if lost:
    logging.warning(
      '%s: %d %s examples have a prompt that another has with a different '
      'answer. The last answer is the one that counts.',
      name,
      lost,
      split,
    )


def _dataset(
  name: str, category: str, splits: Mapping[Split, list[Example]]
) -> Dataset:
  def examples(split: Split, seed: int) -> Iterator[Example]:
    rng = random.Random(f'{name}/{split}/{seed}')
    known = splits.get(split, [])
    if split != 'train':
      distinct = {example.prompt: example for example in known}
      yield from rng.sample(list(distinct.values()), len(distinct))
      return
    while known:
      yield from rng.sample(known, len(known))

  metric, pool = _metric(category, splits), splits.get('train', ())
  logging.info(
    '%s/%s: %s examples, scored by %s.',
    category,
    name,
    {split: len(of_split) for split, of_split in splits.items()},
    metric,
  )
  constant = guessing.constant(pool, [*examples('test', 0)])
  return Dataset(name, category, metric, examples, pool, constant)


def _metric(category: str, splits: Mapping[Split, Iterable[Example]]) -> Metric:
  examples = itertools.chain.from_iterable(splits.values())
  choices = [bool(example.candidates) for example in examples]
  if all(choices):
    return 'accuracy'
  # Rank classification and ROUGE-L do not add up to one score.
  written = category in _WRITTEN and not any(choices)
  return 'rouge_l' if written else 'exact_match'


def _frequent_words(texts: Iterable[str], count: int) -> list[str]:
  frequencies = collections.Counter(
    itertools.chain.from_iterable(map(words_of, texts))
  )
  return [word for word, _ in frequencies.most_common(count)]


def _corpus(path: Path, seed: int) -> Iterator[tuple[Piece, ...]]:
  if not path.exists():
    raise ValueError(
      f'There is no {path} to pretrain on. Write it, one {{"text": "..."}} a '
      'line, or start from a base that is pretrained.'
    )
  texts = []
  for record, where in json_lines.records(path):
    if not isinstance(record.get('text'), str):
      raise ValueError(f'{where} lacks "text".')
    texts.append((Piece(record['text']),))
  rng = random.Random(f'corpus/{seed}')
  while True:
    yield from rng.sample(texts, len(texts))
