"""The bases of the study, in the order in which they are shown."""

from collections.abc import Mapping
from typing import Literal

from experiments.scale_study.analysis.methods import Look

Base = Literal['pretrained', 'instruction-tuned']

BASES: Mapping[Base, Look] = {
  'pretrained': Look('Pretrained', '#e69f00', 'o'),
  'instruction-tuned': Look('Instruction-tuned', '#009e73', 's'),
}
