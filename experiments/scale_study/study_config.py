"""What a preset of the study consists of, and how flags change it."""

import ast
from collections.abc import Mapping, Sequence
import dataclasses
import difflib
import json
import math
from typing import Any

from experiments.scale_study.analysis.cells import BASES
from experiments.scale_study.tasks.source import HELD_IN

PRETRAINED, INSTRUCTION_TUNED = BASES
# Fields of None or a number, which no value shows.
_OPTIONAL_NUMBERS = frozenset({'host_devices'})
# Names that fields may have.
_ALLOWED = {
  'bases': BASES,
  'text_metric': ('exact_match', 'rouge_l'),
  'compute_dtype': ('float32', 'bfloat16'),
}
# The least that whole numbers may be, where it is not 1.
_LEAST = {'seeds': 0, 'direct_steps': 0, 'corpus_length': 2}
# Fields on which no model and none of its scores depends.
OF_MERGES = frozenset({'merged', 'subsets', 'methods', 'sweeps', 'gates'})
# Fields on which no result depends.
_OF_THE_RUN = ('processes', 'strict', 'memory_budget')


@dataclasses.dataclass(frozen=True)
class Scratch:
  """A model that is pretrained by the study itself.

  Attributes:
    width: of the residual stream.
    layers: number of layers.
    heads: number of heads, a divisor of `width`.
  """

  width: int
  layers: int
  heads: int


@dataclasses.dataclass(frozen=True)
class Stored:
  """A model that there is already, in one stage or two.

  Attributes:
    pretrained: a folder of Qwen 2.5, or of Llama up to 3.0 (later ones scale
      rotary positions), as Hugging Face stores them, or an Orbax checkpoint of
      this study's model; None where it is no base.
    instruction_tuned: the same model, instruction-tuned, or 'smollm2', which
      is fetched.
    shape: of Orbax checkpoints, a key of `shapes.SIZES` or a folder with a
      config.json as Hugging Face writes it; None if the models are Hugging
      Face's, which have one.
  """

  instruction_tuned: str
  pretrained: str | None = None
  shape: str | None = None


@dataclasses.dataclass(frozen=True)
class MethodGrid:
  """Hyperparameters of a merge method.

  Attributes:
    fixed: used for all merges alike.
    choices: values by hyperparameter; of all their combinations one is chosen
      on validation data, in place of the fixed.
  """

  fixed: Mapping[str, float] = dataclasses.field(default_factory=dict)
  choices: Mapping[str, tuple[float, ...]] = dataclasses.field(
    default_factory=dict
  )

  def __post_init__(self):
    for name, values in self.choices.items():
      _demand_several(f'choices[{name!r}]', values)
    wrong = [
      name
      for name, values in self.choices.items()
      if not values or name not in self.fixed
    ]
    if wrong:
      raise ValueError(
        f'choices of {wrong}: give at least one value of each, and one in '
        f'fixed, which has {[*self.fixed]}.'
      )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gates:
  """What has to hold before a merge can say anything about a category.

  Attributes:
    learnable: direct training over chance.
    gain: an expert over its base; None asks for more than two standard errors
      of the difference of the two scores, as bases that are good already can
      gain little.
    transfer: the multitask model over chance, on held-out categories.
  """

  learnable: float = 0.3
  gain: float | None = 0.2
  transfer: float = 0.1


@dataclasses.dataclass(frozen=True, kw_only=True)
class StudyConfig:
  """One run of the study.

  Attributes:
    tasks: 'procedural', 'wordnet', 'real', or a folder as `tasks/p3.py` reads
      it.
    categories: held-in categories of the tasks that are taken.
    tokenizer: tokenizer.json of models that there are already, which all sizes
      share; '' takes the tokenizer of the tasks.
    sizes: the models, by name.
    bases: what experts are fine-tuned from.
    seeds: of everything random; a run of everything for each.
    corpus_length: tokens of a text in pretraining.
    length: tokens of an example, at most.
    batch: texts in a step.
    pretrain_steps: on the corpus.
    pretrain_rate: peak learning rate, as are all rates.
    instruction_steps: on the instruction tasks.
    instruction_rate: of these.
    expert_steps: of every expert.
    expert_rates: of which the best on validation data is kept.
    multitask_steps: on all held-in categories.
    multitask_rate: of these.
    direct_steps: on each held-out category, to see that it can be learned; 0
      leaves this gate out.
    direct_rate: of these.
    validation_examples: of a task, at most.
    test_examples: of a task, at most.
    text_metric: 'exact_match' or 'rouge_l', for tasks that ask for ROUGE-L.
    merged: numbers of experts to merge. With 1 among them, each expert is
      merged by itself, for the merging law alone.
    subsets: how many subsets of each other number, at most: those of few
      categories are put together in two ways.
    methods: hyperparameters by merge method.
    sweeps: values by merge method and hyperparameter, for the subset of all
      experts; the others are fixed.
    gates: what a category has to pass to be counted.
    remat: whether activations are computed again in the backward pass.
    compute_dtype: 'float32' or 'bfloat16', of computations; parameters are
      float32.
    mesh: axes of the devices and their sizes; None takes one device.
    memory_budget: host memory for reading checkpoints.
    host_devices: how many CPU devices to simulate; None takes what there is.
    strict: a gate that fails is an error, and so is a streamed merge of all
      experts that is not, bit by bit, the merge in memory.
    processes: how many work side by side.
  """

  tasks: str = 'procedural'
  categories: tuple[str, ...] = HELD_IN
  tokenizer: str = ''
  sizes: Mapping[str, Scratch | Stored]
  bases: tuple[str, ...] = BASES
  seeds: tuple[int, ...] = (0,)
  corpus_length: int = 48
  length: int = 40
  batch: int = 32
  pretrain_steps: int = 3500
  pretrain_rate: float = 3e-3
  instruction_steps: int = 800
  instruction_rate: float = 1.5e-3
  expert_steps: int = 300
  expert_rates: tuple[float, ...] = (5e-4,)
  multitask_steps: int = 900
  multitask_rate: float = 1e-3
  direct_steps: int = 300
  direct_rate: float = 1e-3
  validation_examples: int = 64
  test_examples: int = 100
  text_metric: str = 'exact_match'
  merged: tuple[int, ...] = (2, 4, 6, 8)
  subsets: int = 3
  methods: Mapping[str, MethodGrid]
  sweeps: Mapping[str, Mapping[str, tuple[float, ...]]]
  gates: Gates = Gates()
  remat: bool = False
  compute_dtype: str = 'float32'
  mesh: Mapping[str, int] | None = None
  memory_budget: str = '4GiB'
  host_devices: int | None = None
  strict: bool = False
  processes: int = 1

  def __post_init__(self):
    for field in dataclasses.fields(self):
      name, value = field.name, getattr(self, field.name)
      if isinstance(field.default, tuple):
        _demand_several(name, value)
        if not value or len({*value}) < len(value):
          raise ValueError(
            f'{name}={value} was given; give at least one, and each once.'
          )
        for one in value:
          _demand(name, one)
      else:
        _demand(name, value)
    if {*self.merged} == {1}:
      raise ValueError(
        'merged=(1,) was given; give more than 1 beside it, as experts merged '
        'by themselves, all alone, are in no figure and no table.'
      )
    for name, size in self.sizes.items():
      _demand_kind(f'sizes[{name!r}]', size, Scratch, Stored)
      if '/' in name:
        raise ValueError(f'A size is named {name!r}; give a name without a /.')
    for method, grid in self.methods.items():
      _demand_kind(f'methods[{method!r}]', grid, MethodGrid)
    for method, parameters in self.sweeps.items():
      for name, values in parameters.items():
        _demand_several(f'sweeps[{method!r}][{name!r}]', values)
    _demand_kind('gates', self.gates, Gates)


def override(config: StudyConfig, setting: str) -> StudyConfig:
  """Changes one field of a preset.

  Args:
    config: the preset.
    setting: 'name=value'; values of a tuple are separated by commas.

  Raises:
    ValueError: if there is no such field, the value is not of its kind, or the
      study cannot have it.
  """
  name, equals, text = setting.partition('=')
  fields = [field.name for field in dataclasses.fields(config)]
  if name not in fields or not equals:
    raise ValueError(
      f'--set={setting} is not NAME=VALUE with a field of the preset.'
      + nearest(name, fields)
    )
  current = getattr(config, name)
  try:
    value = _parsed(text, 0 if name in _OPTIONAL_NUMBERS else current)
  except (ValueError, SyntaxError) as error:
    raise ValueError(
      f'--set={setting}: {name} is {current!r} in the preset, and {text!r} is '
      'not of that kind. Mappings are changed in a preset of your own.'
    ) from error
  return dataclasses.replace(config, **{name: value})


def nearest(name: str, names: Sequence[str]) -> str:
  """Words a suggestion, or names all there is."""
  close = difflib.get_close_matches(name, names, n=1)
  return f' Did you mean {close[0]}?' if close else f' Use one of {[*names]}.'


def differences(config: StudyConfig, record: Any) -> dict[str, str]:
  """Says in which fields a preset is not the one that was recorded.

  Args:
    config: the preset.
    record: what `as_json` returned, or of another version of the study: a field
      that it lacks has its default.
  """
  ours = as_json(config)
  theirs = {**_defaults(), **record}
  return {
    name: f'{name} was {theirs.get(name)!r} and is {ours.get(name)!r}'
    for name in dict.fromkeys([*theirs, *ours])
    if name not in _OF_THE_RUN and theirs.get(name) != ours.get(name)
  }


def only_gained(config: StudyConfig, record: Any) -> bool:
  """Whether a preset has what was recorded, and seeds or sizes besides.

  No model depends on which others there are.

  Args:
    config: the preset.
    record: as `differences` takes it.
  """
  ours = as_json(config)
  return (
    differences(config, record).keys() <= {'seeds', 'sizes'}
    and {*record['seeds']} <= {*ours['seeds']}
    and all(ours['sizes'].get(k) == v for k, v in record['sizes'].items())
  )


def as_json(config: StudyConfig) -> dict[str, Any]:
  """Returns what decides the results, as JSON has it."""
  record = dataclasses.asdict(config)
  for name in _OF_THE_RUN:
    del record[name]
  return json.loads(json.dumps(record))


def _defaults() -> dict[str, Any]:
  """Returns what fields are that no preset has to give, as JSON has them."""
  made = as_json(StudyConfig(sizes={}, methods={}, sweeps={}))
  return {name: value for name, value in made.items() if value != {}}


def _demand(name: str, value: Any) -> None:
  """Raises ValueError if a field, or an entry of it, cannot be this."""
  allowed = _ALLOWED.get(name)
  if allowed and value not in allowed:
    raise ValueError(
      f'{name}={value!r} was given; it is one of {", ".join(allowed)}.'
    )
  least = _LEAST.get(name, 1)
  if isinstance(value, int) and not isinstance(value, bool) and value < least:
    raise ValueError(f'{name}={value} was given; give {least} or more.')
  if isinstance(value, float) and not value > 0:
    raise ValueError(f'{name}={value} was given; give more than 0.')


def _demand_several(name: str, values: Any) -> None:
  if not isinstance(values, tuple | list):
    raise ValueError(
      f'{name}={values!r} was given; give a tuple, such as ({values!r},).'
    )


def _demand_kind(name: str, value: Any, *kinds: type) -> None:
  if not isinstance(value, kinds):
    known = ' or '.join(kind.__name__ for kind in kinds)
    raise ValueError(f'{name}={value!r} was given; give {known}(...).')


def _parsed(text: str, current: Any) -> Any:
  if isinstance(current, tuple):
    kind = type(current[0])
    return tuple(_parsed(part, kind()) for part in text.split(',') if part)
  if isinstance(current, str):
    return text
  value = ast.literal_eval(text)
  if isinstance(current, float) and isinstance(value, int | float):
    if math.isfinite(value):
      return float(value)
  elif type(value) is type(current):
    return value
  raise ValueError(text)
