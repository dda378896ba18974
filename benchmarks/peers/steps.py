"""What every engine is asked to train on, and how its answer is printed. Plain Python: a peer has its own environment.

The work file, made by benchmarks/training.py:

    model      folder of the model, with a scalar head in `reward`
    sft        steps of rows of token ids; every token counts
    pairwise   steps of pairs, each {"prompt", "chosen", "rejected"}: token ids
    ppo        steps of prompts, each {"messages", "ids"}; `new_tokens` are sampled after each, no more and no fewer
    epochs     passes over the rollouts of a PPO update, each one optimizer step with all of them
    optimizer  of all parts: learning_rate, b1, b2, eps, clip_norm

The first step of each part is not counted.
"""

import argparse
import json
import resource
import time


def arguments() -> tuple[dict, argparse.Namespace]:
    """The work, and what of it this process is to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", help="the work file")
    parser.add_argument("--part", choices=("sft", "pairwise", "ppo"), required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--remat", default="none", help="ours alone")
    options = parser.parse_args()
    with open(options.work, encoding="utf-8") as stream:
        return json.load(stream), options


class Clock:
    """Seconds of every step but the first."""

    def __init__(self):
        self.seconds = []
        self._steps, self._since = 0, 0.0

    def start(self):
        self._since = time.perf_counter()

    def stop(self):
        self._steps += 1
        if self._steps > 1:
            self.seconds.append(time.perf_counter() - self._since)


def report(version: str, clock: Clock, **more) -> None:
    """The result as the last line of standard output, with the most memory that this process has held."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"version": version, "seconds": clock.seconds, "peak_bytes": peak, **more}), flush=True)
