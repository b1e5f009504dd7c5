"""Writes datasets of P3 as a folder that the study reads.

  pip install datasets
  python -m experiments.tools.export_p3 --output=data/p3

reads them from the Hub, or from a local folder of the same with --source. P3,
the public pool of prompts, holds every dataset under many templates (Sanh et
al., 2021, arXiv 2110.08207), one configuration each, named
`<dataset>_<template>`. On the Hub it is Parquet since March 2024; a source that
is a loading script cannot be read by `datasets` 4 and later. The output gets a
folder for each dataset with `train.jsonl`, `validation.jsonl` and `test.jsonl`,
in the schema of `experiments.scale_study.tasks.p3`. Datasets that the source
lacks are left out, with a warning.

A local folder has a README.md that begins with its configurations, as on the
Hub,

  ---
  configs:
  - config_name: imdb_Movie_Expressed_Sentiment
    data_files:
    - {split: train, path: imdb/train.jsonl}
    - {split: validation, path: imdb/validation.jsonl}
  ---

and rows such as

  {"inputs_pretokenized": "A fine film. Good or bad?",
   "targets_pretokenized": "Good", "answer_choices": ["Good", "Bad"]}

Many test splits of P3 have no labels. So the examples of its validation split
(or its test split, for want of one) become test examples; for held-in datasets
every other one becomes a validation example instead. P3 does not say which rows
of two templates are the same item. Where all templates hold the same items in
the same order, an item is validation or test under all of them; where one
leaves items out, those behind may be validation under one template and test
under another, and choices made on validation examples have then seen some of
the test. There is a warning if templates differ in their number of rows.
"""

import collections
from collections.abc import Iterator, Mapping, Sequence
import importlib
import json
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from tqdm import tqdm

from experiments.scale_study.tasks.source import HELD_IN, Split
from experiments.scale_study.tasks.tokenizer import spaced

# Yadav et al. (2024, arXiv 2410.03617) name the categories and how many
# datasets each has, not which: this choice is ours.
DATASETS = {
  'multiple_choice_qa': ('cosmos_qa', 'sciq'),
  'extractive_qa': ('quoref', 'ropes'),
  'closed_book_qa': ('kilt_tasks_hotpotqa', 'wiki_qa'),
  'sentiment': ('imdb', 'rotten_tomatoes'),
  'topic_classification': ('ag_news', 'trec'),
  'structure_to_text': ('common_gen', 'wiki_bio'),
  'summarization': ('gigaword', 'samsum'),
  'paraphrase_identification': ('glue_mrpc', 'glue_qqp'),
  'sentence_completion': ('super_glue_copa', 'hellaswag'),
  'natural_language_inference': ('super_glue_rte', 'super_glue_cb'),
  'coreference_resolution': (
    'super_glue_wsc.fixed',
    'winogrande_winogrande_xl',
  ),
  'word_sense_disambiguation': ('super_glue_wic',),
}

# Rows are shuffled within so many, which is all there are where a dataset is
# sorted by label: with fewer, the first 12,500 of imdb would have one answer.
_SHUFFLED = 50_000

_OUTPUT = flags.DEFINE_string(
  'output', None, 'Folder to write; made if it is not there.'
)
_SOURCE = flags.DEFINE_string(
  'source',
  'bigscience/P3',
  'Name on the Hub, or a local folder whose README.md lists configurations.',
)
_EXAMPLES = flags.DEFINE_integer(
  'examples',
  1000,
  'Rows read of every template and split, at most.',
  lower_bound=1,
)
_MAX_WORDS = flags.DEFINE_integer(
  'max_words', 300, 'Leaves out examples with more words than this.'
)


def record(
  row: Mapping[str, Any], category: str, dataset: str, template: str
) -> dict[str, Any] | str:
  """Makes a line of the study's schema from a row of P3.

  Returns:
    The line as a dict, or why the row is of no use.
  """
  inputs = (row.get('inputs_pretokenized') or '').strip()
  targets = (row.get('targets_pretokenized') or '').strip()
  choices = [choice.strip() for choice in row.get('answer_choices') or ()]
  if not inputs or not targets:
    return 'no text'
  if choices and targets not in choices:
    return 'answer not among the choices'
  if len({*choices}) == 1:
    return 'nothing to choose from'
  if len({*map(spaced, choices)}) < len({*choices}):
    return 'choices differ by white space alone'
  return {
    'inputs': inputs,
    'targets': targets,
    'answer_choices': choices or None,
    'category': category,
    'dataset': dataset,
    'template': template,
  }


def export(
  output: Path,
  datasets: Mapping[str, tuple[str, ...]],
  *,
  source: str,
  examples: int,
  max_words: int,
) -> None:
  """Writes a folder.

  Args:
    output: the folder.
    datasets: names by category.
    source: name of P3 on the Hub, or a local folder.
    examples: rows read of every template and split, at most.
    max_words: longer examples are left out.

  Raises:
    ImportError: if the library `datasets` is not installed.
    OSError: if the source cannot be read.
    ValueError: if the source is a loading script, it has no template of any
      dataset, a configuration lacks a split, or no example is left.
  """
  templates = _templates_of(datasets, source)
  wrote = False
  progress = tqdm(templates.items(), unit='dataset', disable=None)
  for (category, name), found in progress:
    progress.set_postfix_str(name)
    lines: dict[Split, list[dict[str, Any]]] = collections.defaultdict(list)
    useless = collections.Counter()
    tested = dict.fromkeys(found, 0)
    for template in found:
      for split, row in _rows(source, f'{name}_{template}', category, examples):
        tested[template] += split != 'train'
        line = record(row, category, name, template)
        if isinstance(line, str):
          useless[line] += 1
        elif len(f'{line["inputs"]} {line["targets"]}'.split()) > max_words:
          useless['too long'] += 1
        else:
          lines[split].append(line)
    if category in HELD_IN and len({*tested.values()}) > 1:
      logging.warning(
        '%s: the templates have different numbers of rows, so that an item may '
        'be validation under one and test under another: %s',
        name,
        tested,
      )
    wrote |= bool(lines)
    for split, of_split in lines.items():
      _warn_of_one_answer(name, split, of_split)
      path = output / name / f'{split}.jsonl'
      path.parent.mkdir(parents=True, exist_ok=True)
      text = ''.join(f'{json.dumps(line)}\n' for line in of_split)
      path.write_text(text, encoding='utf-8')
    logging.info(
      '%s: %s; left out: %s',
      name,
      {split: len(of_split) for split, of_split in lines.items()},
      dict(useless),
    )
  if not wrote:
    raise ValueError(
      f'No example of {source} is left, so nothing was written; why is said '
      'above. Raise --max_words if they are too long.'
    )


def _templates_of(
  datasets: Mapping[str, tuple[str, ...]], source: str
) -> dict[tuple[str, str], list[str]]:
  """Returns the templates by category and dataset, of those that are there."""
  try:
    known = _library().get_dataset_config_names(source)
  except OSError as error:
    raise OSError(
      f'{source} cannot be read ({error}). Give --source a name on the Hub, '
      'where there is a network, or a local folder.'
    ) from error
  except RuntimeError as error:  # such as of a loading script
    raise ValueError(
      f'{source} cannot be read ({error}). The library reads files alone, as '
      'Parquet or JSON lines: convert it into a local folder of such files, '
      'whose README.md lists the configurations, as --help shows.'
    ) from error
  asked = [(of, name) for of, names in datasets.items() for name in names]
  templates = {key: _templates(key[1], known) for key in asked}
  missing = [f'{name}_' for of, name in asked if not templates[of, name]]
  if len(missing) == len(asked):
    raise ValueError(
      f'No configuration begins with {" or ".join(map(repr, missing))} among '
      f'the {len(known)} of {source}: {", ".join(known[:5])}, ... A local '
      'folder lists its configurations in README.md, as --help shows.'
    )
  if missing:
    logging.warning(
      'Left out, since no configuration of %s begins so: %s.',
      source,
      ', '.join(missing),
    )
  return {key: found for key, found in templates.items() if found}


def _warn_of_one_answer(
  name: str, split: Split, lines: Sequence[Mapping[str, Any]]
) -> None:
  """Says of which templates all answers are the same choice."""
  answers: dict[str, set[str]] = collections.defaultdict(set)
  for line in lines:
    if line['answer_choices']:
      answers[line['template']].add(line['targets'])
  alike = [template for template, given in answers.items() if len(given) == 1]
  if alike:
    logging.warning(
      '%s: all %s examples of %s have the same answer, so that nothing can be '
      'learned or told from them. Read more rows, by --examples.',
      name,
      split,
      ', '.join(alike),
    )


def _templates(dataset: str, known: list[str]) -> list[str]:
  """Returns the templates of a dataset, without copies made for scoring."""
  prefix = f'{dataset}_'
  return [
    name.removeprefix(prefix)
    for name in known
    if name.startswith(prefix) and not name.endswith('_score_eval')
  ]


def _rows(
  source: str, configuration: str, category: str, count: int
) -> Iterator[tuple[Split, dict[str, Any]]]:
  """Yields rows of a configuration and the split each goes to."""
  splits = _library().load_dataset(source, configuration, streaming=True)
  held_in = category in HELD_IN
  tested = splits.get('validation', splits.get('test'))
  if tested is None or (held_in and 'train' not in splits):
    raise ValueError(
      f'{configuration} has {", ".join(splits)}, and needs validation or test'
      f'{" and train" if held_in else ""}: add what is missing, or take this '
      'configuration out of the source.'
    )
  # One seed for all templates, and every other row: rows have no name. Of items
  # in the same order, each goes to the same split under every template.
  for index, row in enumerate(_some(tested, count)):
    held_back = held_in and index % 2 == 0
    yield 'validation' if held_back else 'test', row
  if held_in:
    for row in _some(splits['train'], count):
      yield 'train', row


def _some(rows: Any, count: int) -> Any:
  return rows.shuffle(seed=0, buffer_size=_SHUFFLED).take(count)


def _library() -> Any:
  try:
    # Only this tool needs it, where there is a network.
    return importlib.import_module('datasets')
  except ImportError as error:
    raise ImportError(
      'P3 is read with the Hugging Face library datasets, which is not '
      'installed: pip install datasets'
    ) from error


def main(argv: list[str]) -> str | None:
  """Exports what the flags say and returns what went wrong, if anything."""
  if len(argv) > 1:
    raise app.UsageError(f'Unexpected arguments: {argv[1:]}.')
  if not _OUTPUT.value:
    raise app.UsageError('Give --output, the folder to write.')
  output = Path(_OUTPUT.value)
  try:
    export(
      output,
      DATASETS,
      source=_SOURCE.value,
      examples=_EXAMPLES.value,
      max_words=_MAX_WORDS.value,
    )
  except (ImportError, OSError, ValueError) as error:
    return str(error)
  print(f'Wrote {output}.')


if __name__ == '__main__':
  app.run(main)
