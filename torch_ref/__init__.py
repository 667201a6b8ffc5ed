"""The tutorials' training loops in plain PyTorch: the reference that `jaxgpt` is compared with.

Of `jaxgpt` it imports the configuration alone (`jaxgpt.config`, `jaxgpt.presets`), so that no mistake is shared. To
read beside the tutorials, in this order: `model`, `data`, `train_step`, `train`, `generate`, `finetune`. `datasets` and
`command` serve the commands: datasets by name, flags, files and errors.
"""
