"""What the study needs of its data, whichever source it comes from.

Sources are built by `procedural.source()`, `p3.source(folder)`,
`wordnet.source(folder)`, `real.source()`; nothing else in the study knows which
one it has.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
import dataclasses
from pathlib import Path
from typing import Literal, NamedTuple

from experiments.scale_study.tasks.tokenizer import Tokenizer

Split = Literal['train', 'validation', 'test']
Metric = Literal['accuracy', 'exact_match', 'rouge_l']

# Categories of the study, as T0 groups P3 (Sanh et al., 2021, arXiv
# 2110.08207) and as Yadav et al. (2024, arXiv 2410.03617) divide them.
HELD_IN = (
  'multiple_choice_qa',
  'extractive_qa',
  'closed_book_qa',
  'sentiment',
  'topic_classification',
  'structure_to_text',
  'summarization',
  'paraphrase_identification',
)
HELD_OUT = (
  'sentence_completion',
  'natural_language_inference',
  'coreference_resolution',
  'word_sense_disambiguation',
)
# What an instruction-tuned base is trained on besides.
INSTRUCTION = 'instruction'


class Example(NamedTuple):
  """A prompt with its answer.

  `candidates` are the distinct answers, of one word or several, among which a
  model chooses; empty where the answer is free text.
  """

  prompt: str
  answer: str
  candidates: tuple[str, ...] = ()

  @property
  def chance(self) -> float:
    """Probability that a uniform guess is right, 0 for free text."""
    return 1 / len(self.candidates) if self.candidates else 0.0


class Piece(NamedTuple):
  """Part of a text of the corpus; its tokens weigh `weight` in the loss."""

  text: str
  weight: float = 1.0


@dataclasses.dataclass(frozen=True)
class Dataset:
  """A named dataset.

  Attributes:
    name: unique within its source.
    category: one of `HELD_IN`, `HELD_OUT` or `INSTRUCTION`.
    metric: `accuracy` by rank classification where examples have candidates;
      `exact_match` or `rouge_l` where they are free text.
    examples: `examples(split, seed)` yields labelled examples, the same for the
      same seed. Training examples never end, but there may be none. Validation
      and test examples are distinct and may end; no prompt is in two splits.
    pool: all training examples, where they are not made as they are drawn.
    constant: what giving always the same answer reaches on the test, by exact
      match unless `loading` has the score in ROUGE-L; 0 where answers are
      equally frequent by construction.
  """

  name: str
  category: str
  metric: Metric
  examples: Callable[[Split, int], Iterator[Example]]
  pool: Sequence[Example] = ()
  constant: float = 0.0

  @property
  def held_in(self) -> bool:
    """Whether an expert is trained on it."""
    return self.category in HELD_IN

  def has(self, split: Split) -> bool:
    """Whether there are examples of a split."""
    return next(self.examples(split, 0), None) is not None


@dataclasses.dataclass(frozen=True)
class Source:
  """Everything models are trained and scored on.

  Attributes:
    held_in: datasets by category, for experts and the multitask model.
    held_out: datasets by category that no model is trained on.
    instruction: what makes an instruction-tuned base of a pretrained one.
    corpus: `corpus(seed)` yields texts for pretraining forever.
    tokenizer: turns the texts into tokens.
    corpus_file: of these texts, where they are not made as they are drawn.
  """

  held_in: Mapping[str, tuple[Dataset, ...]]
  held_out: Mapping[str, tuple[Dataset, ...]]
  instruction: tuple[Dataset, ...]
  corpus: Callable[[int], Iterator[tuple[Piece, ...]]]
  tokenizer: Tokenizer
  corpus_file: Path | None = None

  @property
  def categories(self) -> dict[str, tuple[Dataset, ...]]:
    """Held-in and held-out categories, in this order."""
    return {**self.held_in, **self.held_out}


def demand_held_in(categories: Iterable[str]) -> None:
  """Raises ValueError if one of them is no held-in category."""
  unknown = set(categories) - set(HELD_IN)
  if unknown:
    raise ValueError(
      f'{", ".join(sorted(unknown))} are no held-in categories; those are '
      f'{", ".join(HELD_IN)}.'
    )
