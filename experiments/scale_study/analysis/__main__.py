"""Analyses the merges of a study.

  python -m experiments.scale_study.analysis RESULTS_DIR

Reads cells.jsonl, gates.json and, if they are there, questions.json,
rouge_l.csv, config.json and seconds.jsonl, and writes verdicts.json, law.json,
tables, figures and report.html beside them. The same files give the same
numbers, under the same NumPy and SciPy on the same kind of processor.
"""

import io
from pathlib import Path
import sys

from absl import app

from experiments.scale_study.analysis.report import analyse


def main(argv: list[str]) -> None:
  """Reads the one argument and prints the verdicts."""
  if len(argv) != 2:
    raise app.UsageError('Give one folder that has cells.jsonl and gates.json.')
  folder = Path(argv[1])
  for name in ('cells.jsonl', 'gates.json'):
    if not (folder / name).is_file():
      raise app.UsageError(f'{folder / name} is missing: run the grid first.')
  print(analyse(folder))


if __name__ == '__main__':
  if isinstance(sys.stdout, io.TextIOWrapper):
    # A locale may have no ≥ and no −.
    sys.stdout.reconfigure(errors='backslashreplace')
  app.run(main)
