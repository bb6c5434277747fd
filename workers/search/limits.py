"""The constants of the search, each with its reason. Seconds unless said otherwise."""

from __future__ import annotations

Factor = tuple[float, float]

# Who goes on

MOST_FINALISTS = 2  # that can win; the fastest safe one beside them. A third that is as fast is nothing lost
MOST_TUNED = 2  # engines whose runtime options are varied: each costs up to four timings
TUNING_GAIN = 1.25  # what other runtime options may still gain over a backend's defaults, at most, as measured
SLOWER = 0.97  # beyond what two processes of one engine differ by, which a short timing does not know
# The lower end of a short timing, from which on the full one is not expected to turn it around. Where it does, those
# that were spared are measured after all.
CLEARLY_FASTER = 1.10

# Two engines for one bundle

MOST_PAIRED = 4  # engines that are timed at the other batch sizes because one may win there: a timing of some seconds
# Of the fastest at the size that counts: who is slower by more never won at another that is so many times as large, as
# measured. What a call costs besides computing is shared by the batch: of larger ones the same for each such step.
PAIR_WITHIN, PAIR_STEP = 0.4, 8.0
PAIR_GAIN = 1.05  # at some batch size over the engine that would ship alone: the full measurement has to show 3 %

# Short timings, per engine and batch size

SCREEN_SECONDS = 0.4  # six windows that hold hundreds of calls of a small model, and one each of a large one
TUNE_SECONDS = 0.6  # runtime options differ by less than engines do
OF_THE_FULL = 1 / 6  # no short timing takes more than this part of what the full one takes
ENOUGH_CALLS = 120  # twenty in each of six windows: their median hardly moves with more
LEAST_SCREEN_SECONDS = 0.15  # with less the pauses between the windows take most of the time
NO_ROOM = "not measured: the worker's memory does not hold it beside the original"
NO_MEMORY = ("out_of_memory", "gpu_out_of_memory")
LOADED_FACTOR = 1.6  # memory of a loaded engine over the size of its file: weights, packed copies of some, activations

# Accuracy

FEW = 96  # samples of the small check: a loss of a few percent shows, and a small model is through in a second
AT_ONCE = 4 * FEW  # so few in all that the next candidate is judged on all of them from the start
FULL_SHARE = 0.5  # of the time left to the search, at most, for a check on all samples
CHEAP = 0.02  # of the budget: a check on all samples that takes less is made at once
CHEAP_OF_LEFT = 0.05  # of the time left to the search, likewise
CALL_S = 1.0  # of a check: starting it, loading the engine
CHECK_SHARE = 0.15  # of the time left to the search, beyond which a check is only made of what is faster
SHORT = 0.25  # of the budget: where less is left to the search after the first timing, time is short

# Winning accuracy back

WIN_BACK_GAIN = 1.05  # an inaccurate engine is mended where it is faster than the best accurate one by this
MENDING = 2.0  # of what making an engine took: equalizing its graph and quantizing that
KEEPING = 0.5  # likewise, where keeping nodes in higher precision takes no new calibration
MENDED = 0.95  # of the speed of the engine that it was made from, about, is what a mended one keeps
ALPHAS = (0.8, 0.5)  # of the equalization; the first helped real embedding models, the second helps with outliers
REMAKING = 3.0  # times what the quantization took: else there is no time to calibrate anew, and to judge that
# Mean and deviation of the logarithm of what a way leaves of the loss, as measured (docs/quantization.md).
EQUALIZED: Factor = (-0.5, 1.0)  # halves it or more in some transformers, and makes it worse with the wrong alpha
RECALIBRATED: Factor = (0.05, 0.25)  # a quarter less at best; where they clip what counts, many times as much
KEPT: Factor = (-1.3, 0.8)  # with up to half of the work in higher precision
LEAST_GAIN = 0.005  # that a way is expected to bring: its chance times the logarithm of what is faster then
LITTLE_GAIN = 0.01  # likewise, where nothing is faster: what is mended is smaller, or its speed is not known so well
LEAST_LIMIT = 0.1  # percent of loss: a limit of less is taken as this, for the chances
FIRST_KEPT = 1 / 32  # of the work of the quantized nodes, where the search for their number begins
FEW_KEPT = 1 / 24  # likewise: to keep less than that gains nothing that could be measured
MOST_KEPT = 0.5  # likewise: beyond that the gain is gone
LITTLE_ERROR = 0.25  # of the mean node's error: what hurts less is kept last
SENSITIVITY_SAMPLES = 16  # each costs an inference per node and group of nodes
FEWEST_SAMPLES = 2
SENSITIVITY_CALLS = 45  # about how many nodes and groups of them are measured
SIMULATED = 1.5  # what a call takes there, over the original's
SENSITIVITY_SHARE = 0.2  # of the time left, which the number of samples goes by
TRAINING_PAYS = 1.1  # over the best accurate engine: it takes minutes, and what is less is not worth them
TRAINING = 20.0  # what training takes per sample, over an inference of the original: two passes forward and one back
TRAINING_SAMPLE_S = 5e-4  # likewise, whatever the model: a step of 32 samples calls hundreds of operators
TRAINING_LEAST = 700  # samples: the fewest steps that are made, and the calibration before them
TRAINING_CALLS_S = 20.0  # of the calls that train and export, beside the training itself
TIMINGS_KEPT = 3  # of one engine: what mending leaves of the search's time to time what it mends
