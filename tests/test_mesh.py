"""One table of shardings: total, checked, and with the same numbers on one device and on eight."""

import json
import os
import socket
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from cai_jax.config import Mesh
from cai_jax.errors import UserError
from cai_jax.mesh import make_mesh, shardings
from cai_jax.models.families import param_shapes, tiny_config

EIGHT_DEVICES = """
import json, sys
import jax, numpy as np
from cai_jax import Sampler, Sampling, load_model
from cai_jax import config as configs
from cai_jax.mesh import make_mesh, put_rows, shardings
from cai_jax.objectives.model_losses import sft_objective
from cai_jax.sampler import Generate, Score
from cai_jax.training.step import init_state, make_optimizer, make_schedule, make_train_step

data, fsdp, tensor = json.loads(sys.argv[1])
devices = jax.devices()[: data * fsdp * tensor]
mesh = make_mesh(configs.Mesh(data, fsdp, tensor), devices)
model = load_model("random:llama", shardings=lambda shapes: shardings(mesh, shapes))
sampler, greedy = Sampler(model, max_length=256, rows=8, mesh=mesh), Sampling(temperature=0.0, max_new_tokens=12)
ask = lambda text: {"role": "user", "content": text}
samples = sampler.generate([[ask(f"Count to {i}.")] for i in range(8)], greedy)
starts = [[ask(f"{word} " * 9), {"role": "assistant", "content": "Yes."}] for word in ("one", "two")]
def from_start_to_start(i):
    sample = yield Generate([*starts[i // 3 % 2], ask(f"Count to {i}.")], greedy)
    scores = yield Score([*starts[i % 2], ask(sample.text or "What?")], ["Yes", "No, never."])
    return sample.tokens, [float(np.sum(score)) for score in scores]
stood = [found for _, found in sorted(sampler.stream(map(from_start_to_start, range(16)), starts[0], starts[1:]))]
schedule = make_schedule(configs.Optimizer(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0), 2)
# With a smaller eps Adam makes whole steps of gradients that are nothing but rounding, and these differ by mesh.
optimizer = make_optimizer(configs.Optimizer(eps=1e-5), schedule)
state = init_state(model.params, optimizer, mesh)
step = make_train_step(sft_objective(model.config), optimizer, schedule, mesh, state)
rng = np.random.default_rng(0)
tokens = rng.integers(3, 250, (8, 32)).astype(np.int32)
batch = {"tokens": tokens, "positions": np.tile(np.arange(32, dtype=np.int32), (8, 1)),
         "segments": np.ones_like(tokens), "targets": np.ones_like(tokens)}
losses = []
for _ in range(3):
    state, metrics = step(state, put_rows(mesh, batch))
    losses.append([float(metrics["loss"]), float(metrics["grad_norm"])])
split = sum(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(state.opt_state))
print(json.dumps({"tokens": [[s.tokens for s in samples], [tokens for tokens, _ in stood]],
                  "scores": [scores for _, scores in stood], "losses": losses, "split_moments": split}))
"""


# Each wait in a collective holds a thread of XLA's pool; independent ones can use up a small pool and hang.
os.environ.setdefault("NPROC", "64")
EIGHT = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8"


def on_devices(*shape) -> dict:
    result = subprocess.run(
        [sys.executable, "-c", EIGHT_DEVICES, json.dumps(shape)], capture_output=True, text=True,
        env={**os.environ, "XLA_FLAGS": EIGHT},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def test_training_and_sampling_give_the_same_numbers_on_eight_devices():
    alone = on_devices(1, 1, 1)
    for shape in ((8, 1, 1), (2, 2, 2), (1, 4, 2)):
        split = on_devices(*shape)
        assert split["tokens"] == alone["tokens"]
        np.testing.assert_allclose(split["scores"], alone["scores"], rtol=1e-4)
        np.testing.assert_allclose(split["losses"], alone["losses"], rtol=1e-5)
        assert (split["split_moments"] > 0) == (shape[1] * shape[2] > 1)


EVERY_OBJECTIVE = """
import json, sys
from dataclasses import replace
from types import SimpleNamespace
import jax, numpy as np
from cai_jax import config as configs, load_model
from cai_jax.mesh import make_mesh, put_rows, shardings
from cai_jax.objectives import model_losses as losses, sft
from cai_jax.objectives.ppo import no_scores
from cai_jax.stages.ppo import Frozen, score_rollouts
from cai_jax.stages.rewards import Source
from cai_jax.stages.rollouts import Prompts, Rollouts
from cai_jax.stages.scoring import score_texts
from cai_jax.training.batches import pair_rows
from cai_jax.training.step import start_training

shapes, microbatches, attention = json.loads(sys.argv[1])
rng = np.random.default_rng(0)
B, T, P, N = 16, 24, 10, 14
policy, reward = load_model("random:llama"), load_model("random:llama", kind="reward", seed=1)
ensemble = load_model("random:llama", kind="reward", seed=1, heads=3)
tokens = rng.integers(3, 250, (B, T)).astype(np.int32)
noise = rng.standard_normal((6, B, N)).astype(np.float32)
lengths = rng.integers(2, N, B)
packed = {"tokens": tokens, "positions": np.tile(np.arange(T // 2, dtype=np.int32), (B, 2)),
          "segments": np.repeat([[1, 2]], T // 2, 1).repeat(B, 0).astype(np.int32),
          "targets": (rng.random((B, T)) < np.linspace(0.1, 1, B)[:, None]).astype(np.int32)}
pairs = pair_rows([[rng.integers(3, 250, rng.integers(3, 9)).tolist() for _ in "pab"] for _ in range(B)], T)
real = (np.arange(B) % 5 > 0).astype(np.int32)
places = np.arange(T) - rng.integers(0, P, B)[:, None]
rollouts = {"tokens": tokens, "positions": np.where((places >= 0) & (np.arange(T) < P + lengths[:, None]), places, -1),
            "mask": (np.arange(N) < lengths[:, None]).astype(np.int32), "old_logprobs": noise[0] * .1 - 5,
            "old_values": noise[1], "advantages": noise[2], "returns": noise[3]}
other = jax.tree.map(lambda leaf: leaf * 1.1, policy.params)
shared = {**packed, "segments": packed["segments"] * (np.arange(T) >= 3),
          "targets": packed["targets"] * rng.integers(1, 3, (B, T))}
sparse = {**shared, "targets": shared["targets"] * (np.arange(T) % 6 == 2)}
sft.CHUNK = 16  # many slabs, of which a sparse batch fills the first
work = {
    "sparse": (losses.sft_objective(policy.config, attention=attention, anchor=0.7, share_start=True),
               {"p": {"policy": policy.params, "reference": other}}, sparse),
    "sft": (losses.sft_objective(policy.config, attention=attention), {"p": policy.params}, packed),
    "anchored": (losses.sft_objective(policy.config, attention=attention, anchor=0.7, share_start=True),
                 {"p": {"policy": policy.params, "reference": other}}, shared),
    "pairwise": (losses.reward_objective(reward.config), {"p": reward.params},
                 {**pairs, "probability": rng.random(B).astype(np.float32), "real": real}),
    "ensemble": (losses.reward_objective(ensemble.config, margin=0.5), {"p": ensemble.params},
                 {**pairs, "probability": rng.random(B).astype(np.float32), "real": real,
                  "head_weights": rng.poisson(1, (B, 3)).astype(np.float32)}),
    "dpo": (losses.dpo_objective(policy.config, beta=0.1), {"p": policy.params},
            {**pairs, "ref_logprobs": -20 * rng.random((B, 2)).astype(np.float32), "real": real}),
    "ppo": (losses.ppo_objective(policy.config, reward.config, temperature=0.7, clip=0.2, value_clip=0.2,
                                 value_coef=0.1, attention=attention),
            {"p": {"policy": policy.params, "value": reward.params}}, rollouts),
}
texts = [rng.integers(3, 250, n).tolist() for n in rng.integers(3, 60, 20)]
small, policy_values = load_model("random:llama", "int8"), load_model("random:llama", kind="reward", seed=2)
run = configs.Config(configs.Model("random:llama", attention=attention), "a test",
                     ppo=configs.Ppo(rollouts=B, minibatches=1, microbatches=microbatches))

def scores(mesh):
    '''What the stages score: rollouts by an int8 reference, values and rewards; texts by the reward model.'''
    context = SimpleNamespace(config=run, mesh=mesh, put_rows=lambda batch: put_rows(mesh, batch))
    place = lambda model: replace(model, params=jax.device_put(model.params, shardings(mesh, model.params)))
    scorer = place(reward)
    frozen = Frozen(place(small), Source("model", scorer), Prompts([], P), scorer.config)
    asked = Rollouts("update-0", [], [], {**rollouts, "truncated": lengths == N})
    params = {"policy": None, "value": place(policy_values).params}
    batch, report, _ = score_rollouts(context, frozen, params, asked, 0.5, 0.02, no_scores())
    scored = {name: batch[name] for name in ("old_values", "advantages", "returns")}
    texts_scored = score_texts(context, scorer.config, scorer.params, texts)
    return {name: np.asarray(x).tolist() for name, x in {**scored, **report, "texts": texts_scored}.items()}

found, scored = {}, []
for shape in shapes:
    mesh = make_mesh(configs.Mesh(*shape), jax.devices()[: np.prod(shape)])
    scored.append(scores(mesh))
    for name, (objective, params, batch) in work.items():
        params = jax.device_put(params["p"], shardings(mesh, params["p"]))
        settings = configs.Optimizer(learning_rate=1e-2, schedule="constant", warmup_fraction=0.0)
        state, step = start_training(objective, params, settings, 9, mesh, microbatches)
        rows = []
        for _ in range(2):
            state, metrics = step(state, put_rows(mesh, batch))
            rows.append({key: float(x) for key, x in metrics.items()})
        found.setdefault(name, []).append(rows)
print(json.dumps([found, scored]))
"""


def on_every_mesh(shapes, microbatches, attention="auto"):
    """Objective -> for each mesh shape -> metrics of two steps; for each mesh shape -> what scoring finds."""
    result = subprocess.run(
        [sys.executable, "-c", EVERY_OBJECTIVE, json.dumps([shapes, microbatches, attention])],
        capture_output=True, text=True, env={**os.environ, "XLA_FLAGS": EIGHT},
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout.splitlines()[-1])


def assert_meshes_agree(found, scored):
    for split in scored[1:]:
        for name, alone in scored[0].items():
            np.testing.assert_allclose(split[name], alone, rtol=1e-5, atol=1e-5, err_msg=name)
    for name, (alone, *others) in found.items():
        assert alone[0]["loss"] != alone[1]["loss"], name
        for split in others:
            for one, other in zip(alone, split, strict=True):
                for key, value in one.items():
                    np.testing.assert_allclose(other[key], value, rtol=1e-5, atol=1e-6, err_msg=f"{name} {key}")


def test_every_objective_and_scoring_give_the_same_numbers_on_one_and_on_eight_devices():
    assert_meshes_agree(*on_every_mesh([(1, 1, 1), (2, 4, 1), (2, 2, 2)], microbatches=2))


@pytest.mark.slow
@pytest.mark.parametrize("microbatches, attention", [(1, "auto"), (4, "auto"), (1, "splash")])
def test_every_objective_and_scoring_give_the_same_numbers_on_every_mesh(microbatches, attention):
    shapes = [(1, 1, 1), (8, 1, 1), (1, 8, 1), (2, 2, 2), (1, 4, 2), (4, 1, 2)]
    assert_meshes_agree(*on_every_mesh(shapes, microbatches, attention))


TWO_PROCESSES = """
import sys
import jax, numpy as np
jax.distributed.initialize(sys.argv[1], num_processes=2, process_id=int(sys.argv[2]))
from cai_jax.config import Mesh
from cai_jax.mesh import make_mesh, put_rows
whole = {"tokens": np.arange(24).reshape(8, 3), "real": np.arange(8)}
placed = put_rows(make_mesh(Mesh()), whole)
for name, array in placed.items():
    assert array.shape == whole[name].shape, array.shape
    assert not array.is_fully_addressable
    [shard] = array.addressable_shards
    np.testing.assert_array_equal(shard.data, whole[name][shard.index])
    assert shard.index[0] == slice(4 * jax.process_index(), 4 * jax.process_index() + 4)
"""


def test_every_process_places_its_part_of_the_whole_batch():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    processes = [
        subprocess.Popen([sys.executable, "-c", TWO_PROCESSES, address, str(n)], stderr=subprocess.PIPE, text=True,
                         env={**os.environ, "JAX_PLATFORMS": "cpu"})
        for n in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], errors


def fake_mesh(**sizes):
    axes = {"data": 1, "fsdp": 1, "tensor": 1, **sizes}
    return jax.sharding.AbstractMesh(tuple(axes.values()), tuple(axes))


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3", "gemma2", "gemma3_text", "mistral"])
@pytest.mark.parametrize("kind", ["policy", "reward"])
def test_the_table_names_every_leaf_and_splits_every_large_one(family, kind):
    shapes = param_shapes(tiny_config(family), kind)
    placed = shardings(fake_mesh(fsdp=2, tensor=2), shapes)
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(shapes), jax.tree.leaves(placed), strict=True
    ):
        assert leaf.size < 2000 or not sharding.is_fully_replicated, (path, leaf.shape)


def test_an_unknown_leaf_is_refused_by_name():
    with pytest.raises(UserError, match="'layers/router'"):
        shardings(fake_mesh(), {"layers": {"router": jnp.zeros((2, 4, 4))}})


def test_an_indivisible_mesh_is_refused_with_the_sizes_that_fit():
    with pytest.raises(UserError, match=r"leaf 'layers/q'.*mesh.tensor to one of \[1"):
        shardings(fake_mesh(tensor=3), {"layers": {"q": jnp.zeros((2, 64, 64))}})


def test_a_mesh_that_does_not_fit_the_devices_is_refused():
    with pytest.raises(UserError, match="does not fit"):
        make_mesh(Mesh(data=3, fsdp=5, tensor=1))
    assert make_mesh(Mesh()).devices.size == jax.device_count()
