"""What `jaxgpt bench` runs: training steps of this project and of PyTorch, timed alternately on this machine.

`steps` compares implementations of one configuration, `scaling` varies its sizes, `loop` measures what the trainer adds
to its bare step, `tune_cpu` measures the thresholds of `jaxgpt.parallel.CpuTuning`. `alternating` times contenders
round by round, `implementations` is the process of one of them, `page` writes docs/benchmarks.md. Commands of their
own: `plans` makes the table of docs/accelerators.md, `accelerator` measures what needs a GPU or TPU, `tokenise`
measures how shards of tokens are made.
"""
