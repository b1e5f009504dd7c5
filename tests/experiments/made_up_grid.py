"""A study that was never run, whose true effects are known."""

from collections.abc import Collection, Iterator, Mapping
import dataclasses
import json
import math
from pathlib import Path

import numpy as np

from experiments.scale_study.analysis import cells
from experiments.scale_study.analysis.aggregate import Results
from experiments.scale_study.analysis.cells import (
  Base,
  BASES,
  Cell,
  Gate,
  METHODS,
)

HELD_IN = (
  'multiple_choice_qa',
  'extractive_qa',
  'closed_book_qa',
  'sentiment',
  'topic',
  'structure_to_text',
  'summarization',
  'paraphrase',
)
HELD_OUT = ('completion', 'inference', 'coreference', 'word_sense')

# Each size has twice the parameters of the one before.
SIZES = {'s': 100_000, 'm': 200_000, 'l': 400_000}

_SCALES = {
  'average': (),
  'task_arithmetic': (0.2, 0.35, 0.5, 0.7, 1.0),
  'dare_ties': (0.35, 0.6, 1.0, 1.4),
  'ties': (0.5, 1.0, 1.5, 2.0, 3.0),
}


@dataclasses.dataclass(frozen=True)
class Truth:
  """The effects of the five findings, and what else there is to know.

  Attributes:
    quality: how much more experts of the instruction-tuned base keep.
    rise: of held-in a doubling, at N = 2.
    lost: held-in from N = 2 to N = 8 at the smallest size.
    lost_less: by how much less that is a doubling.
    spread: best − worst method at the smallest size.
    spread_less: by how much less that is a doubling.
    held_out: merge ÷ base.
    held_out_multitask: multitask ÷ base.
    law: floor, B, beta, A, gamma, b of the loss; S from the smallest size.
    noise: standard deviation of a score of one seed and subset.
  """

  quality: float = 0.1
  rise: float = 0.02
  lost: float = 0.16
  lost_less: float = 0.03
  spread: float = 0.08
  spread_less: float = 0.02
  held_out: float = 1.1
  held_out_multitask: float = 1.05
  law: tuple[float, ...] = (0.5, 0.4, 0.6, 0.3, 0.4, 0.5)
  noise: float = 0.0

  def held_in(self, base: str, method: str, n: int, doublings: float) -> float:
    """Merge ÷ expert of one arm."""
    place = METHODS.index(method) / (len(METHODS) - 1) - 0.5
    return (
      0.7
      + self.quality * BASES.index(base)
      + self.rise * doublings
      - (n - 2) / 6 * (self.lost - self.lost_less * doublings)
      + place * (self.spread - self.spread_less * doublings)
    )

  def loss(self, n: int, doublings: float) -> float:
    """Loss of one arm."""
    floor, b_, beta, a, gamma, b = self.law
    size = 2**doublings
    return floor + b_ * size**-beta + a * size**-gamma / (n + b)


def study(
  truth: Truth = Truth(),  # noqa: B008 (frozen)
  *,
  sizes: Mapping[str, int] = SIZES,
  bases: Collection[Base] = BASES,
  methods: Collection[str] = METHODS,
  ns: Collection[int] = (2, 4, 6, 8),
  seeds: int = 3,
  settings: Collection[str] = ('validated',),
  sweeps: bool = False,
  failing: Collection[tuple[str, str, str]] = (),
) -> Results:
  """Makes a study with these arms.

  Args:
    truth: its effects.
    sizes: parameters by name.
    bases: what the experts were fine-tuned from.
    methods: of the merges.
    ns: numbers of experts.
    seeds: how many.
    settings: of the hyperparameters.
    sweeps: whether scales and densities were swept as well.
    failing: gates that fail, (size, base, category).
  """
  made = []
  for seed in range(seeds):
    generator = np.random.default_rng(seed)
    for n in ns:
      for number, subset in enumerate(subsets(n, generator)):
        for size, parameters in sizes.items():
          for base in bases:
            for method in methods:
              arm = Arm(truth, sizes, size, parameters, base, method)
              drawn = (n, subset, number, seed, generator)
              made += [arm.cell(*drawn, setting) for setting in settings]
              if sweeps and number == 0:
                made += arm.sweep(*drawn)
  gates = [
    Gate(
      size=size,
      base=base,
      category=name,
      split='held-in' if name in HELD_IN else 'held-out',
      score=0.52 if (size, base, name) in failing else 0.9,
      chance=0.25 if name in HELD_IN else 0.5,
      passed=(size, base, name) not in failing,
      gate='an expert beats its base by 0.2'
      if name in HELD_IN
      else 'multitask beats chance by 0.1',
      seed=0,
    )
    for size in sizes
    for base in bases
    for name in (*HELD_IN, *HELD_OUT)
  ]
  return Results(tuple(made), tuple(gates))


def write(made: Results, folder: Path) -> None:
  """Writes what the grid would have written."""
  folder.mkdir(parents=True, exist_ok=True)
  lines = [json.dumps(dataclasses.asdict(cell)) for cell in made.cells]
  (folder / 'cells.jsonl').write_text('\n'.join(lines) + '\n')
  gates = []
  for gate in map(dataclasses.asdict, made.gates):
    gate['pass'] = gate.pop('passed')
    gates.append(gate)
  (folder / 'gates.json').write_text(json.dumps(gates))


def append(path: Path, cell: Cell) -> None:
  """Adds a cell to a file, which need not exist yet."""
  with path.open('a') as file:
    file.write(json.dumps(dataclasses.asdict(cell)) + '\n')


def subsets(
  n: int, generator: np.random.Generator
) -> Iterator[tuple[str, ...]]:
  """Balanced subsets: blocks of the smaller of n and 8 − n, or the rest."""
  order = [HELD_IN[i] for i in generator.permutation(len(HELD_IN))]
  if n == len(order):
    yield tuple(order)
    return
  width = min(n, len(order) - n)
  for start in range(0, len(order), width):
    block = order[start : start + width]
    rest = [name for name in order if name not in block]
    yield tuple(block if n == width else rest)


@dataclasses.dataclass(frozen=True)
class Arm:
  """One size, base and method."""

  truth: Truth
  sizes: Mapping[str, int]
  size: str
  parameters: int
  base: str
  method: str

  def cell(self, n, subset, number, seed, generator, setting, **changed):
    """One merge; `changed` replaces fields, `better` adds to held-in."""
    better = changed.pop('better', 0.0)
    doublings = math.log2(self.parameters / min(self.sizes.values()))
    expert = {name: 0.8 + 0.02 * i for i, name in enumerate(HELD_IN)}
    base = {name: 0.5 * score for name, score in expert.items()}
    base |= dict.fromkeys(HELD_OUT, 0.6)
    multitask = {name: 0.95 * score for name, score in expert.items()}
    multitask |= dict.fromkeys(HELD_OUT, 0.6 * self.truth.held_out_multitask)
    kept = self.truth.held_in(self.base, self.method, n, doublings) + better
    scores = {
      name: (kept + generator.normal(0, self.truth.noise)) * expert[name]
      for name in HELD_IN
    }
    for name in HELD_OUT:
      noise = generator.normal(0, self.truth.noise)
      scores[name] = 0.6 * (self.truth.held_out + noise)
    hyperparameters = {'scale': 0.5} if self.method != 'average' else {}
    where = f'runs/{self.size}/{self.base}/seed_{seed}'
    fields = {
      'size': self.size,
      'parameters': self.parameters,
      'base': self.base,
      'method': self.method,
      'n': n,
      'subset': subset,
      'subset_number': number,
      'seed': seed,
      'setting': setting,
      'hyperparameters': hyperparameters,
      'checkpoints': {
        'base': f'{where}/base@4f1c',
        'experts': {name: f'{where}/{name}@9a0e' for name in subset},
      },
      'command': f'python -m experiments.scale_study --set=seeds={seed}',
      'drift': (0.01 + 0.01 * METHODS.index(self.method)) * math.sqrt(n),
      'loss': self.truth.loss(n, doublings),
      'scores': scores,
      'expert': expert,
      'base_scores': base,
      'multitask': multitask,
      'held_in': HELD_IN,
      'held_out': HELD_OUT,
    }
    return Cell(**fields | changed)

  def sweep(self, n, subset, number, seed, generator):
    """Cells along the scale and, for TIES, along the density."""
    for split in cells.Split.__args__:
      points = [({'scale': s}, s) for s in _SCALES[self.method]]
      if self.method == 'ties':
        points += [({'density': d, 'scale': 1.0}, d) for d in (0.1, 0.2, 0.5)]
      for hyperparameters, value in points:
        yield self.cell(
          n,
          subset,
          number,
          seed,
          generator,
          'sweep',
          split=split,
          hyperparameters=hyperparameters,
          better=-0.15 * math.log(value / 0.5) ** 2,
        )
