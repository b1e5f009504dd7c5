"""What was run, where, and what was chosen: a section of the report.

From `config.json` and `seconds.jsonl`. What a folder does not have of them, as
older ones do not have all, is not told.
"""

from collections.abc import Iterable, Mapping, Sequence
import json
from pathlib import Path
from typing import Any, NamedTuple

from experiments.scale_study.analysis import names
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.cells import category
from experiments.scale_study.analysis.markup import items, paragraphs, table

_TASKS = {
  'procedural': 'The data are synthetic: a micro-world that the study '
  'generates itself, of sentences about people, topics, opinions and scenes '
  'with exact labels, of about 400 words. Examples of training are fresh at '
  'every step.',
  'wordnet': 'The data are questions about real words and a corpus of plain '
  'sentences, made at run time of an installed WordNet.',
  'real': 'The data are real texts, of packages that are fetched at run time: '
  'movie reviews (vaderSentiment), descriptions of Debian’s packages (apt), '
  'and words with their definitions (WordNet).',
}
_INSTRUCTION = (
  'The tasks of instruction tuning, about single words and lists of them, '
  'share their answer formats with the categories of the study, but no '
  'question and no task. This is what Flan does too, from which the tasks of '
  'T0 had been removed before the paper’s base was tuned on it.'
)
# By fields of the configuration, of models that are trained from nothing.
_PRETRAINING = {
  'pretraining': '{pretrain_steps} steps at a rate of {pretrain_rate}, on '
  'texts of {corpus_length} tokens',
  'instruction tuning': '{instruction_steps} steps at {instruction_rate}',
}
_REST = {
  'experts': 'one of each held-in category, {expert_steps} steps at '
  '{expert_rates}',
  'multitask model': '{multitask_steps} steps at {multitask_rate}, on all '
  'held-in categories',
  'direct training': '{direct_steps} steps at {direct_rate} on each held-out '
  'category, for a gate alone',
  'batch': '{batch} texts of at most {length} tokens',
  'training': 'all parameters, by AdamW; rates are peaks, after a warm-up of 5 '
  '% of the steps and before a cosine',
  'seeds': '{seeds}: each with experts, subsets and masks of its own; all '
  'answer the same questions',
  'merges': 'N = {merged}, at most {subsets} subsets each',
  'questions of a task': 'at most {test_examples} of the test and '
  '{validation_examples} of validation',
  'their digest': '{questions}',
}
_CHOICES = (
  'λ, density and drop rate are chosen together for each subset, by what its '
  'merge keeps of the experts’ scores on held-in validation questions; no '
  'held-out question is asked. Values that are the same for all merges '
  '(“fixed”) stand beside it.',
  'In Dare-TIES DARE’s drop and rescaling come first, in place of TIES’s trim '
  'unless a density is given; then signs are elected, and what agrees is '
  'averaged.',
  'Of an expert’s learning rates, where there are several, the one that is '
  'best on its validation questions is kept.',
  'Subsets are balanced, not drawn at random: disjoint while there are '
  'categories left, and complements of such where they are of more than half.',
  'Categories count where they passed gates, and intervals are of seeds: the '
  'paper tells of neither.',
)


class Run(NamedTuple):
  """What a folder knows of how its merges were made.

  Attributes:
    config: the preset, as `config.json` has it.
    phases: lines of `seconds.jsonl`.
  """

  config: Mapping[str, Any] = {}
  phases: Sequence[Mapping[str, Any]] = ()


UNKNOWN = Run()


def load(folder: Path) -> Run:
  """Reads `config.json` and `seconds.jsonl`, if they are there."""
  config, seconds = folder / 'config.json', folder / 'seconds.jsonl'
  return Run(
    json.loads(config.read_text('utf-8')) if config.is_file() else {},
    [*map(json.loads, seconds.read_text('utf-8').splitlines())]
    if seconds.is_file()
    else (),
  )


def section(results: Results, run: Run) -> str:
  """Tells tasks, models, training and merges; where; and our own choices."""
  return (
    paragraphs(*_of_tasks(run.config))
    + table(['', ''], _rows(results, run.config))
    + '<h3>Our own choices where the paper is silent</h3>'
    + items([_metric(run.config), *_CHOICES])
    + '<h3>By which code, and where</h3>'
    + _machines(run.phases)
  )


def _of_tasks(config: Mapping[str, Any]) -> Iterable[str]:
  if not config:
    yield 'There is no config.json that would tell of tasks and training.'
  if tasks := config.get('tasks'):
    yield _TASKS.get(tasks, f'The data are JSON lines of the folder {tasks}.')
  tuned = 'instruction-tuned' in config.get('bases', ())
  if tasks == 'procedural' and tuned and _is_trained(config):
    yield _INSTRUCTION


def _is_trained(config: Mapping[str, Any]) -> bool:
  return any('width' in size for size in config.get('sizes', {}).values())


def _rows(
  results: Results, config: Mapping[str, Any]
) -> Iterable[tuple[str, str]]:
  for split in ('held_in', 'held_out'):
    tasks = {task for cell in results.cells for task in getattr(cell, split)}
    categories = sorted({category(task).replace('_', ' ') for task in tasks})
    if tasks:
      yield (
        split.replace('_', '-'),
        f'{names.join(categories)} ({names.counted(len(tasks), "task")})',
      )
  sizes = config.get('sizes', {})
  for size, parameters in results.sizes.items():
    count = f'{names.amount(parameters)} parameters'
    yield f'size {size}', count + _shape(sizes.get(size, {}))
  # What is 0 was not done.
  fields = {name: _said(value) for name, value in config.items() if value}
  trained = _PRETRAINING if _is_trained(config) else {}
  for name, text in {**trained, **_REST}.items():
    if told := _filled(text, fields):
      yield name, told
  for method, grid in config.get('methods', {}).items():
    choices = [
      f'{name.replace("_", " ")} {_said(values)}'
      for name, values in grid.get('choices', {}).items()
    ]
    if choices:
      yield names.title(method), f'chosen of {"; ".join(choices)}'


def _shape(size: Mapping[str, Any]) -> str:
  stored = [size.get('pretrained'), size.get('instruction_tuned')]
  told = ' and '.join(str(path) for path in stored if path)
  if told:
    return f', {told} as stored'
  return _filled(', {layers} layers of width {width}, {heads} heads', size)


def _filled(text: str, fields: Mapping[str, Any]) -> str:
  """Returns '' if a field is missing."""
  try:
    return text.format_map(fields)
  except KeyError:
    return ''


def _said(value: Any) -> str:
  if isinstance(value, list):
    return names.join(map(_said, value))
  return f'{value:,g}' if isinstance(value, int | float) else str(value)


def _metric(config: Mapping[str, Any]) -> str:
  written = 'answers that are written have to match exactly'
  if config.get('text_metric') == 'rouge_l':
    written += ', but for ROUGE-L in structure to text and summarization'
  return (
    'Metrics: of candidate answers the likeliest is taken, and the score is '
    f'accuracy; {written}.'
  )


def _machines(phases: Sequence[Mapping[str, Any]]) -> str:
  if not phases:
    return paragraphs('There is no seconds.jsonl that would tell.')
  found: dict[tuple[str, str], list[Mapping[str, Any]]] = {}
  for phase in phases:
    commit = phase.get('commit')
    where = ', '.join(
      f'{name.replace("_", " ")} {value}'
      for name, value in phase.items()
      if name not in ('part', 'phase', 'cpu', 'wall', 'commit')
    )
    code = f'commit {commit}' if commit else 'not recorded'
    found.setdefault((code, where or 'not recorded'), []).append(phase)
  sizes = dict.fromkeys(map(_size, phases))
  rows = []
  for (code, where), here in found.items():
    done: dict[tuple[str, ...], list[str]] = {}
    for name in dict.fromkeys(phase.get('phase', '') for phase in here):
      of = {_size(phase) for phase in here if phase.get('phase', '') == name}
      done.setdefault(tuple(s for s in sizes if s in of), []).append(name)
    told = [f'{", ".join(did)} of {", ".join(of)}' for of, did in done.items()]
    seconds = sum(phase.get('cpu', 0) for phase in here)
    rows.append((code, '; '.join(told), f'{seconds:,.0f}', where))
  return table(['code', 'phases, and sizes', 'CPU seconds', 'machine'], rows)


def _size(phase: Mapping[str, Any]) -> str:
  return phase.get('part', '').partition('/')[0]
