"""All planted faults."""

from tests.parity_pairs import bert, gpt2, llama, lstm, resnet

PLANTED = [*gpt2.FAULTS, *llama.FAULTS, *bert.FAULTS, *resnet.FAULTS, *lstm.FAULTS]
