"""Flags for processes whose machine code need not be fast.

As `compile_pod.py` compiles: XLA divides programs and plans their memory as it
does otherwise, and LLVM, which takes most of the time, hurries.
"""

XLA_FLAGS = (
  '--xla_backend_optimization_level=0 '
  '--xla_llvm_disable_expensive_passes=true '
  '--xla_cpu_use_fusion_emitters=false'
)
