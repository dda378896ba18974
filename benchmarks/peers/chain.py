"""What every engine is asked to do, and how its answer is printed. Plain Python: each peer has its own environment.

The work file, made by benchmarks/work.py:

    model      folder of the model                  preamble   messages before every critique and revision
    chains     rows of the measured run: messages, and for each round the requests for a critique and a revision
    warm_up    as many rows with other prompts
    new_tokens of every completion of the chain: no more and, whatever the model says, no fewer
    plain      points of plain decoding: rows, new_tokens, and three sets of prompts (conversations and their ids):
               for the warm-up, for the time to the first token, and for the whole
"""

import argparse
import json
import time


def row_program(chain: dict, preamble: list):
    """One row of critique and revision as a generator: yields conversations, is sent texts, returns the last one."""
    messages = chain["messages"]
    newest = yield messages
    for requests in chain["rounds"]:
        asked = [*preamble, *messages, turn("assistant", newest), turn("user", requests["critique"])]
        critique = yield asked
        newest = yield [*asked, turn("assistant", critique), turn("user", requests["revision"])]
    return newest


def turn(role: str, content: str) -> dict:
    return {"role": role, "content": content}


def arguments() -> tuple[dict, argparse.Namespace]:
    """The work, and what of it this process is to do."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", help="the work file")
    parser.add_argument("--part", choices=("chain", "plain"), required=True)
    parser.add_argument("--precision", choices=("float32", "bfloat16"), required=True)
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--gguf", default="", help="the model as a GGUF file, for those that read nothing else")
    options = parser.parse_args()
    with open(options.work, encoding="utf-8") as stream:
        return json.load(stream), options


def timed(work) -> float:
    """Seconds that `work()` takes."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def plain_points(work: dict, decode) -> dict:
    """Plain decoding: `decode(prompts, new_tokens)` timed at every point, after a warm-up with the same shapes.

    `prompts` is a set of the point: {"conversations", "ids"}. Seconds of the whole and of the first token alone: their
    difference is decoding without prefill.
    """
    points = []
    for point in work["plain"]:
        warm_up, first, whole = point["sets"]
        new_tokens = point["new_tokens"]
        decode(warm_up, 1)
        decode(warm_up, new_tokens)
        points.append({
            "rows": point["rows"],
            "new_tokens": new_tokens,
            "first_seconds": timed(lambda: decode(first, 1)),  # noqa: B023 - called at once
            "seconds": timed(lambda: decode(whole, new_tokens)),  # noqa: B023
        })
    return {"points": points}


def report(result: dict) -> None:
    """The result as the last line of standard output."""
    print(json.dumps(result), flush=True)
