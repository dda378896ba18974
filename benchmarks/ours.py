"""Our own engine at the same work as the peers, by its public interface."""

import sys
from pathlib import Path

import jax

from cai_jax import Sampler, Sampling, __version__, load_model
from cai_jax.sampler import Generate

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from chain import arguments, plain_points, report, row_program, timed  # noqa: E402


def main():
    work, options = arguments()
    model = load_model(work["model"], dtype="float32")

    def sampler(rows, max_length, **settings):
        return Sampler(model, max_length=max_length, rows=rows, dtype=options.precision, ignore_stops=True, **settings)

    version = {"version": f"cai_jax {__version__}, jax {jax.__version__}"}
    part = plain(work, sampler) if options.part == "plain" else chain(work, sampler)
    report(version | part)


def plain(work, sampler) -> dict:
    samplers = {}

    def decode(prompts, new_tokens):
        rows, length = len(prompts["ids"]), len(prompts["ids"][0])
        if rows not in samplers:
            # Without reuse: what the template writes before every prompt would be computed once, by ours alone.
            samplers[rows] = sampler(rows, length + max(point["new_tokens"] for point in work["plain"]), reuse=False)
        sampling = Sampling(temperature=1.0, max_new_tokens=new_tokens)
        samples = samplers[rows].generate(prompts["conversations"], sampling, seed=0)
        assert all(len(sample.tokens) == new_tokens for sample in samples)

    return plain_points(work, decode)


def chain(work, sampler) -> dict:
    rows = len(work["chains"])
    sampling = Sampling(temperature=1.0, max_new_tokens=work["new_tokens"])

    def row(number, requests):
        program = row_program(requests, work["preamble"])
        conversation, step = next(program), 0
        while True:
            sample = yield Generate(conversation, sampling, seed=1000 * number + step)
            assert len(sample.tokens) == work["new_tokens"]
            try:
                conversation, step = program.send(sample.text), step + 1
            except StopIteration as end:
                return end.value

    def run(engine, chains):
        return engine.run([row(*numbered) for numbered in enumerate(chains)], prefix=work["preamble"])

    run(sampler(rows, work["context"]), work["warm_up"])
    engine = sampler(rows, work["context"])  # another one: nothing of the warm-up is in its cache
    seconds = timed(lambda: run(engine, work["chains"]))
    counts = engine.counts
    return {
        "rows": rows, "seconds": seconds, "generated": counts.generated, "prefilled": counts.prefilled,
        "reused": counts.reused, "occupancy": counts.generated / max(1, counts.steps),
    }  # fmt: skip


if __name__ == "__main__":
    main()
