"""Compares the logits of a GGUF file with the reference, by hand.

  python -m tests.experiments.compare_gguf MODEL.gguf

The reference takes the file's matrices as they are, turns neighbouring features
and computes in float64.
"""

import json
from pathlib import Path
import sys
import tempfile

import gguf
import numpy as np

from experiments.scale_study import gguf_file, huggingface, model
from experiments.scale_study.subword import Subwords
from tests.experiments import llama_reference

TEXT = (
  'The river was high after a week of rain, and the old bridge had been closed '
  'since 1984.'
)


def main(source: Path) -> None:
  with tempfile.TemporaryDirectory() as folder:
    gguf_file.write_hugging_face(source, Path(folder))
    config = json.loads((Path(folder) / 'config.json').read_text())
    ids = Subwords(f'{folder}/tokenizer.json').encode(TEXT)
    shape, params = huggingface.load(Path(folder))
    ours = np.asarray(model.logits(shape, params, np.array([ids])))
  tensors = {
    tensor.name: gguf.dequantize(tensor.data, tensor.tensor_type)
    for tensor in gguf.GGUFReader(source).tensors
  }
  theirs = llama_reference.logits(
    config, llama_reference.from_gguf(tensors), [ids], neighbours=True
  )
  following = theirs[0, np.arange(len(ids) - 1), ids[1:]]
  loss = np.log(np.exp(theirs[0, :-1]).sum(-1)) - following
  print(
    f'{len(ids)} tokens, logits up to {abs(theirs).max():.1f}: they differ by '
    f'{abs(ours - theirs).max():.1e} at most; loss {loss.mean():.2f} nats'
  )


if __name__ == '__main__':
  main(Path(sys.argv[1]))
