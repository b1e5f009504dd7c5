"""What a preset of the study consists of."""

from collections.abc import Mapping
import dataclasses


@dataclasses.dataclass(frozen=True)
class StudyConfig:
  """One run of the study.

  Attributes:
    host_devices: how many CPU devices to simulate; None takes the machine's
      accelerators as they are.
    width: of the residual stream; a multiple of `heads` and of the devices.
    layers: number of transformer layers.
    heads: number of attention heads.
    length: tokens in a text, at most.
    batch: texts in a step.
    pretrain_steps: steps on the corpus, in whole chunks of `train.CHUNK_STEPS`.
    pretrain_rate: peak learning rate of pretraining.
    expert_steps: steps of every expert, in whole chunks likewise.
    expert_rate: peak learning rate of the experts.
    test_examples: examples on which a task is scored.
    methods: hyperparameters by name of the merge method.
    seed: of initialization, corpus, training examples and merges.
  """

  host_devices: int | None
  width: int
  layers: int
  heads: int
  length: int
  batch: int
  pretrain_steps: int
  pretrain_rate: float
  expert_steps: int
  expert_rate: float
  test_examples: int
  methods: Mapping[str, Mapping[str, float]]
  seed: int = 0
