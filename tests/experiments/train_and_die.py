"""A phase of `test_train` whose process is killed in its third chunk."""

import itertools
import os
from pathlib import Path
import signal
import sys

import jax

from experiments.scale_study import model, train
from tests.experiments import test_train


def main(directory: Path) -> None:
  def texts():
    yield from itertools.islice(
      test_train.batches(), 2 * train.CHUNK_STEPS + 20
    )
    os.kill(os.getpid(), signal.SIGKILL)

  params = model.create(test_train._CONFIG, jax.random.key(0))
  test_train.phase(params, directory, texts())


if __name__ == '__main__':
  main(Path(sys.argv[1]))
