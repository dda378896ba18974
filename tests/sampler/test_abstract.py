"""What is compiled for absent chips is what the sampler runs: the same shapes, the same programs."""

import jax
import numpy as np
import pytest

from cai_jax import Sampler, Sampling, load_model
from cai_jax.config import Mesh
from cai_jax.mesh import bytes_on_a_device, make_mesh
from cai_jax.models.families import param_shapes
from cai_jax.sampler import abstract, decode


def shapes(tree):
    return jax.tree.map(lambda x: (np.shape(x), np.asarray(x).dtype if np.isscalar(x) else x.dtype), tree)


@pytest.fixture(scope="module")
def run():
    """A sampler on a mesh of one device, with the arguments of its last call of each program."""
    model, mesh = load_model("random:llama"), make_mesh(Mesh(), jax.devices()[:1])
    calls = {}

    def record(name):
        program = getattr(decode, name)

        def recorded(*args, **kwargs):
            calls[name] = shapes(args[2:-1] if name == "decode" else args[2:])
            return program(*args, **kwargs)

        patch.setattr(decode, name, recorded)

    with pytest.MonkeyPatch.context() as patch:
        record("prefill")
        record("decode")
        sampler = Sampler(model, max_length=256, rows=4, mesh=mesh, prefill_tokens=64)
        sampler.generate([[{"role": "user", "content": "Count."}]], Sampling(max_new_tokens=2))
    prefixes = sampler._cache.prefix_rooms
    shape = abstract.SamplerShape(model.config, 4, 256, prefixes, "float32", prefill_tokens=64)
    return sampler, shape, mesh, calls


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_shapes_are_those_of_the_sampler(run, monkeypatch, name):
    _, shape, mesh, calls = run
    lowered = {}

    class Program:
        @staticmethod
        def lower(config, mesh, *args, **kwargs):
            lowered[name] = shapes(args)

    monkeypatch.setattr(decode, name, Program)
    getattr(abstract, f"lower_{name}")(shape, mesh)
    # The number of stop tokens is the tokenizer's: one here, as in most models.
    assert lowered[name] == calls[name]


def test_bytes_are_those_of_the_sampler(run):
    sampler, shape, mesh, _ = run
    weights, cache = abstract.abstract_weights(shape, mesh, "cpu"), abstract.abstract_cache(shape, mesh, "cpu")
    assert shapes(weights) == shapes(sampler._weights)
    assert shapes(cache) == shapes(sampler._cache)
    assert bytes_on_a_device(cache) == sum(leaf.nbytes for leaf in jax.tree.leaves(sampler._cache))


def test_all_four_programs_lower(run):
    _, shape, mesh, _ = run
    params = param_shapes(shape.config, "policy")
    for lowered in (
        abstract.lower_prepare(shape, mesh, params), abstract.lower_prefill(shape, mesh),
        abstract.lower_decode(shape, mesh), abstract.lower_share(shape, mesh),
    ):  # fmt: skip
        assert "func" in lowered.as_text()
