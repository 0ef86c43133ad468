"""How tests compile: most of their time is XLA's, for programs that run once or twice on few numbers."""

from importlib.metadata import version

QUICKLY = "--xla_backend_optimization_level=0"
"""XLA_FLAGS for code that takes less time to make and more to run. What is done to HLO, collectives included, stays."""

if tuple(map(int, version("jaxlib").split(".")[:2])) < (0, 11):
    # The older emitters of fusions: a step compiles in a third of the time. Newer jaxlibs do not have them, nor the flag.
    QUICKLY += " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
