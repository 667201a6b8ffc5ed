"""Every tolerance of the parity suite, with its reason, and the worst value measured.

A tolerance stands well above what rounding does and well below what the least mutant does (docs/parity.md has both).
The measured values are the worst of two CPU cores with jax 0.10.1 on Python 3.11 and jax 0.12.0.1 on 3.13, PyTorch
2.13. "R" is the root mean square of our error over PyTorch's own, both against PyTorch in float64.
"""

from jaxgpt.parity import levels
from jaxgpt.parity.tolerances import NOTHING_MAY_RAISE, RAISED, Tolerance, Tolerances

_SUMS_64 = "sums of at most a few hundred terms, each rounded by 1e-16"
_R_VALUES = "as exact as PyTorch: half as much again for another order of summation"
_R_PRODUCTS = "a product over 1024 values is R 2.4 by itself: without AVX-512 XLA's on a CPU has half the partial sums"
_R_GRADIENTS = "XLA's CPU sums run straight through the rows where PyTorch's cascade, so single biases lose more"
_COUNT = "equal is equal"
_Z = "five standard errors: one in a million by chance, and the seeds are fixed"

_TABLE: dict[tuple[str, str], Tolerance] = {
    ("op value", "float64"): Tolerance(1e-13, 3.3e-16, _SUMS_64),
    ("op value", "float32"): Tolerance(1.5, 1.3, _R_VALUES),
    ("op gradients", "float64"): Tolerance(1e-13, 4.2e-16, _SUMS_64),
    ("op gradients", "float32"): Tolerance(2e-6, 2.6e-07, "sums of at most a few hundred terms, each rounded by 6e-8"),
    ("op gradients, R", "float32"): Tolerance(4.0, 1.6, _R_GRADIENTS),
    ("op value, far from 0", "float64"): Tolerance(
        1e-12, 1.1e-14, "a mean of 100 spreads costs two digits of the rest"
    ),
    ("op gradients, far from 0", "float64"): Tolerance(1e-12, 9.3e-15, "the same two digits"),
    ("op gradients, far from 0", "float32"): Tolerance(5e-5, 6.3e-06, "the same two digits"),
    ("splash attention", "float32"): Tolerance(1.5, 0.93, _R_VALUES),
    ("splash attention, gradients", "float32"): Tolerance(2e-6, 2.8e-7, "sums of 384 terms, each rounded by 6e-8"),
    ("splash attention, gradients, R", "float32"): Tolerance(4.0, 1.1, _R_GRADIENTS),
    ("ids out of range", "float32"): Tolerance(0.0, 0.0, "the share of finite logits where PyTorch raises"),
    ("block", "float64"): Tolerance(1e-12, 5.4e-15, "largest difference; values of order 10, " + _SUMS_64),
    ("block", "float32"): Tolerance(1.5, 0.77, _R_VALUES),
    ("logits", "float64"): Tolerance(1e-12, 1.1e-14, "largest difference; values of order 10, " + _SUMS_64),
    ("logits", "float32"): Tolerance(2.0, 1.7, _R_PRODUCTS),
    ("loss", "float64"): Tolerance(1e-13, 4.5e-16, "a mean of tokens, each rounded by 1e-16"),
    ("loss", "float32"): Tolerance(
        5e-7, 1.9e-07, "one sum of some hundred tokens and one division: eight roundings of 6e-8"
    ),
    ("perplexity", "float64"): Tolerance(1e-13, 1.4e-15, "the loss's relative error times the loss"),
    ("perplexity", "float32"): Tolerance(2e-6, 6.9e-07, "the loss's tolerance times the loss, below 5 here"),
    ("gradients", "float64"): Tolerance(1e-12, 9e-15, "backward through two to four blocks; cancels at the flat start"),
    ("gradients", "float32"): Tolerance(2e-6, 1.3e-06, "the same at 6e-8"),
    ("gradients, documented start", "float32"): Tolerance(
        1e-5,
        3.3e-06,
        "attention is flat there and its queries' gradients cancel: PyTorch's own error is 1.7e-6; R is limited, too",
    ),
    ("gradients, wide model", "float32"): Tolerance(
        5e-6,
        1.9e-6,
        "n_embd 256: sums four times as long; PyTorch's own is 1.9e-6, and R has the same tolerance as everywhere",
    ),
    ("gradients, R median", "float32"): Tolerance(2.0, 1.1, _R_GRADIENTS),
    ("gradients, R worst", "float32"): Tolerance(4.0, 2, _R_GRADIENTS),
    ("key bias gradient", "float64"): Tolerance(
        1e-12, 9.7e-15, "its true value is 0: rounding, against the gradient of the query's bias"
    ),
    ("key bias gradient", "float32"): Tolerance(2e-5, 3.5e-06, "the same at 6e-8"),
    ("optimizer", "float64"): Tolerance(1e-14, 2e-15, "elementwise: a dozen roundings of 1e-16 a step"),
    ("optimizer, after 1000 decays", "float64"): Tolerance(
        1e-13,
        3.2e-14,
        "PyTorch rounds 1 - lr * decay and multiplies by it each step: its error grows to 3e-14 (next row), not ours",
    ),
    ("optimizer, 80-bit formula", "float64"): Tolerance(
        1e-14, 4e-15, "a dozen roundings a step, a thousand steps, at random"
    ),
    ("optimizer, ulp of the update", "float32"): Tolerance(
        8.0, 4.9, "a dozen roundings; PyTorch's own worst is 4.8 (optax's bias correction, which ours replaces: 500)"
    ),
    ("clip", "float64"): Tolerance(1e-14, 4.2e-16, "one norm, one division, one product"),
    ("clip", "float32"): Tolerance(5e-7, 8.6e-08, "the same at 6e-8"),
    ("clip, clip_grad_norm_ x norm", "float64"): Tolerance(
        1.01e-6, 1e-06, "PyTorch divides by norm + 1e-6: the two differ by exactly that, relative 1e-6 / norm"
    ),
    ("decay mask", "float32"): Tolerance(0.0, 0.0, _COUNT),
    ("schedule", "float64"): Tolerance(1.0, 0.0, "one unit in the last place"),
    ("schedule, as applied", "float64"): Tolerance(1.0, 0.0, "one unit in the last place"),
    ("schedule, as applied", "float32"): Tolerance(1.0, 0.0, "one unit in the last place"),
    ("schedule, torch's schedulers", "float64"): Tolerance(
        1e-12, 8.5e-15, "share of the peak rate: theirs is a recursion over 2000 steps, each rounded by 1e-16"
    ),
    ("trajectory, every loss", "float64"): Tolerance(1e-10, 6.7e-16, "100 steps of Adam, which amplifies rounding"),
    ("trajectory, every parameter", "float64"): Tolerance(1e-10, 2e-13, "100 steps of Adam, which amplifies rounding"),
    ("trajectory, every loss, clip_grad_norm_", "float64"): Tolerance(
        1e-7, 3.1e-09, "PyTorch's 1e-6 beside the norm, 100 times; Adam forgets most of a common factor"
    ),
    ("trajectory, every parameter, clip_grad_norm_", "float64"): Tolerance(1e-6, 7.3e-08, "the same"),
    ("trajectory, against a one-ulp perturbed run", "float64"): Tolerance(
        3.0,
        2.3,
        "PyTorch's own divergence from weights moved by one unit in the last place; part of ours is its decay's",
    ),
    ("trajectory, first ten losses", "float32"): Tolerance(1e-6, 2.2e-07, "before Adam has amplified the rounding"),
    ("trajectory, R(t) median", "float32"): Tolerance(2.0, 0.65, _R_GRADIENTS),
    ("trajectory, R(t) worst", "float32"): Tolerance(4.0, 2.1, _R_GRADIENTS),
    ("bfloat16 logits, every cast made", "bfloat16"): Tolerance(
        0.06,
        0.035,
        "the distance from PyTorch's, in units of PyTorch's own error: sums in another order round elsewhere",
    ),
    ("bfloat16 logits", "bfloat16"): Tolerance(1.5, 1, "the same casts, or, where XLA leaves some out, fewer"),
    ("bfloat16 loss", "bfloat16"): Tolerance(1.5, 1.1, "the same, pooled over 16 draws"),
    ("bfloat16 gradients, R median", "bfloat16"): Tolerance(1.5, 1.1, "the same, pooled over 16 draws"),
    ("bfloat16 gradients, R worst", "bfloat16"): Tolerance(1.5, 1.1, "the same, pooled over 16 draws"),
    ("bfloat16 logits, mean signed error", "bfloat16"): Tolerance(
        4.073, 0.94, "Student's t of 16 draws: its 99.9 % interval holds 0"
    ),
    ("initial weights", "float32"): Tolerance(5.0, 2.3, _Z),
    ("dropout, keep rate", "float32"): Tolerance(5.0, 1.1, _Z),
    ("dropout, scale", "float32"): Tolerance(2e-7, 0.0, "one division by 1 - rate"),
    ("dropout, independence", "float32"): Tolerance(5.0, 2.8, _Z),
    ("greedy text, tokens that differ", "float64"): Tolerance(0.0, 0.0, _COUNT),
    ("sampled text, tokens that differ", "float64"): Tolerance(0.0, 0.0, _COUNT),
    ("sampling, G-test", "float32"): Tolerance(
        6.0, 0.69, "-log10 of the probability of a G as large; the seeds are fixed"
    ),
    ("conversion, tensors that differ", "float64"): Tolerance(0.0, 0.0, _COUNT),
    ("conversion, tensors that differ", "float32"): Tolerance(0.0, 0.0, _COUNT),
    ("converted moments", "float64"): Tolerance(1e-12, 2.2e-15, "the gradients' tolerance"),
    ("converted moments", "float32"): Tolerance(
        1e-5, 1.1e-06, "the gradients' tolerance, doubled by the square of the second moment"
    ),
    ("resume across, every loss", "float64"): Tolerance(1e-10, 5.6e-16, "as a trajectory that stays in one framework"),
    ("resume across, every parameter", "float64"): Tolerance(
        1e-10, 1.2e-14, "as a trajectory that stays in one framework"
    ),
    ("packing, chunks that differ", "float32"): Tolerance(0.0, 0.0, _COUNT),
    ("data, tokens that differ", "int64"): Tolerance(0.0, 0.0, _COUNT),
    ("data, batches that differ", "int64"): Tolerance(0.0, 0.0, _COUNT),
    ("data, examples that differ", "int64"): Tolerance(0.0, 0.0, _COUNT),
    ("validation, mean of batch means", "float64"): Tolerance(1e-13, 1.1e-16, "as the loss"),
    ("validation, mean over tokens", "float64"): Tolerance(1e-13, 2.2e-16, "as the loss"),
    ("perplexity at strides", "float64"): Tolerance(1e-13, 4.4e-16, "as the loss"),
    ("data parallel, loss", "float64"): Tolerance(1e-13, 4.5e-16, "as the loss"),
    ("data parallel, loss", "float32"): Tolerance(5e-7, 2.8e-8, "as the loss"),
    ("data parallel, gradients", "float64"): Tolerance(1e-12, 2.3e-15, "as the gradients"),
    ("data parallel, gradients", "float32"): Tolerance(2e-6, 6.9e-7, "as the gradients"),
    ("data parallel, every loss", "float64"): Tolerance(1e-10, 4.5e-16, "20 steps of Adam, which amplifies rounding"),
    ("data parallel, every parameter", "float64"): Tolerance(
        1e-10, 2.2e-13, "20 steps of Adam, which amplifies rounding"
    ),
    ("classification logits", "float64"): Tolerance(1e-12, 2e-15, "as the logits"),
    ("classification logits", "float32"): Tolerance(1.5, 1.1, _R_VALUES),
    ("classification loss", "float64"): Tolerance(1e-13, 2.2e-16, "as the loss"),
    ("classification loss", "float32"): Tolerance(5e-7, 1.1e-7, "as the loss"),
    ("classification gradients", "float64"): Tolerance(1e-12, 2e-15, "as the gradients"),
    ("classification gradients", "float32"): Tolerance(2e-6, 1.2e-6, "as the gradients"),
    ("classification, predictions that differ", "float64"): Tolerance(0.0, 0.0, _COUNT),
    ("classification, every loss", "float64"): Tolerance(1e-10, 1e-15, "100 steps of Adam, which amplifies rounding"),
    ("classification, every parameter", "float64"): Tolerance(
        1e-10, 7.3e-12, "100 steps of Adam, which amplifies rounding"
    ),
    ("gradient report, mean |g|", "float64"): Tolerance(1e-12, 3.7e-14, "as the gradients"),
    ("gradient report, standard deviation", "float64"): Tolerance(1e-12, 3.8e-14, "as the gradients"),
    ("gradient report, update over weight", "float64"): Tolerance(
        1e-10, 1.1e-13, "the difference of weights before and after, on PyTorch's side: their digits less the update's"
    ),
    ("attention maps", "float64"): Tolerance(1e-13, 2.1e-15, "largest difference; values up to 1, " + _SUMS_64),
    ("token probabilities", "float64"): Tolerance(1e-13, 3.1e-16, "largest difference; values up to 1, " + _SUMS_64),
    ("likeliest tokens that differ", "float64"): Tolerance(0.0, 0.0, _COUNT),
    ("comparison, best steps that differ", "float64"): Tolerance(0.0, 0.0, _COUNT),
    ("early stopping, stops that differ", "float64"): Tolerance(0.0, 0.0, _COUNT),
    ("GPT-2 logits", "float64"): Tolerance(1e-12, 3.6e-15, "as the logits"),
    ("GPT-2 logits", "float32"): Tolerance(1.5, 0.82, _R_VALUES),
    ("end to end", "float32"): Tolerance(1.0, 0.00043, "standard errors of PyTorch's mean over five seeds"),
    ("end to end, one seed", "float32"): Tolerance(
        5e-3, 2e-5, "nats: half of what the seeds of minigpt spread by; rounding alone separates the two frameworks"
    ),
    ("GPU logits", "float32, GPU"): Tolerance(1.5, None, _R_VALUES),
    ("GPU gradients", "float32, GPU"): Tolerance(2.0, None, _R_GRADIENTS),
    ("GPU logits", "bfloat16, GPU"): Tolerance(1.5, None, "the same casts, cuDNN's attention in place of ours"),
    ("GPU gradients", "bfloat16, GPU"): Tolerance(2.0, None, "the same casts, cuDNN's attention in place of ours"),
    ("TPU logits", "float32, TPU"): Tolerance(1.5, None, _R_VALUES),
    ("TPU gradients", "float32, TPU"): Tolerance(2.0, None, _R_GRADIENTS),
    ("TPU logits", "bfloat16, TPU"): Tolerance(1.5, None, "the same casts, splash attention in place of ours"),
    ("TPU gradients", "bfloat16, TPU"): Tolerance(2.0, None, "the same casts, splash attention in place of ours"),
    (RAISED, "any"): Tolerance(NOTHING_MAY_RAISE, 0.0, "nothing may raise"),
}
# Our GPT as a pair is held against what any pair is held against.
_PAIRS = {(f"pair: {check}", precision): tolerance for (check, precision), tolerance in levels.TOLERANCES.items()}
TOLERANCES = Tolerances(_TABLE | _PAIRS)
# What the checks make their rows with.
row, error_row, ratio_row = TOLERANCES.row, TOLERANCES.error_row, TOLERANCES.ratio_row
