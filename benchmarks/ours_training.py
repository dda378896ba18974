"""Our own training at the same work as the peers: the train step of each objective, and PPO as its stage does it."""

import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import jax
import numpy as np

from cai_jax import Sampler, __version__, load_model
from cai_jax import config as configs
from cai_jax.mesh import make_mesh, put_rows
from cai_jax.models.pretrained import Model
from cai_jax.objectives.model_losses import ppo_objective, reward_objective, sft_objective
from cai_jax.objectives.ppo import no_scores
from cai_jax.provenance import row_seed
from cai_jax.stages import ppo as stage
from cai_jax.stages.rewards import Source
from cai_jax.stages.rollouts import Prompts, sample_rollouts
from cai_jax.stages.updates import minibatches
from cai_jax.training.batches import pair_rows
from cai_jax.training.step import start_training

sys.path.insert(0, str(Path(__file__).parent / "peers"))
from steps import Clock, arguments, report  # noqa: E402


def main():
    work, options = arguments()
    clock = Clock()
    mesh = make_mesh(configs.Mesh())
    part = {"sft": sft, "pairwise": pairwise, "ppo": ppo}[options.part]
    losses = part(work, options, mesh, clock)
    report(f"cai_jax {__version__}, jax {jax.__version__}", clock, losses=losses)


def optimizer(work) -> configs.Optimizer:
    return configs.Optimizer(**work["optimizer"], schedule="constant", warmup_fraction=0.0)


def sft(work, options, mesh, clock):
    model = load_model(work["model"], dtype="float32")
    objective = sft_objective(model.config, options.precision, options.remat)

    def batch(rows):
        tokens = np.asarray(rows, np.int32)
        ones = np.ones_like(tokens)
        places = np.broadcast_to(np.arange(tokens.shape[1], dtype=np.int32), tokens.shape)
        return {"tokens": tokens, "positions": places, "segments": ones, "targets": ones}

    return train(model, objective, work, mesh, clock, [batch(rows) for rows in work["sft"]])


def pairwise(work, options, mesh, clock):
    model = load_model(work["reward"], dtype="float32")
    objective = reward_objective(model.config, options.precision, options.remat)

    def batch(pairs):
        texts = [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs]
        length = max(sum(map(len, text)) for text in texts)
        ones = np.ones(len(pairs))
        return pair_rows(texts, length) | {"probability": ones.astype(np.float32), "real": ones.astype(np.int32)}

    return train(model, objective, work, mesh, clock, [batch(pairs) for pairs in work["pairwise"]])


def train(model, objective, work, mesh, clock, batches):
    """Step through the batches; returns their losses. The model's own weights go with the first step."""
    state, step = start_training(objective, model.params, optimizer(work), len(batches), mesh, 1)
    model.params.clear()
    losses = []
    for batch in batches:
        clock.start()
        state, metrics = step(state, put_rows(mesh, batch))
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        clock.stop()
    return losses


def ppo(work, options, mesh, clock):
    """Updates as stages/ppo.py makes them: rollouts, scores, then one step with all rows for each epoch."""
    policy, reward = load_model(work["model"], dtype="float32"), load_model(work["reward"], dtype="float32")
    rows, prompt_length = len(work["ppo"][0]), len(work["ppo"][0][0]["ids"])
    settings = replace(
        configs.Ppo(), rollouts=rows, epochs=work["epochs"], minibatches=1, optimizer=optimizer(work),
        response=configs.Sampling(max_new_tokens=work["new_tokens"]),
    )  # fmt: skip

    def sampler(model):
        length = prompt_length + work["new_tokens"]
        return Sampler(model, max_length=length, rows=rows, dtype=options.precision, ignore_stops=True)

    shape = configs.Model(work["model"], compute_dtype=options.precision, remat=options.remat)
    context = SimpleNamespace(
        config=configs.Config(shape, "benchmark", ppo=settings),
        mesh=mesh,
        put_rows=lambda batch: put_rows(mesh, batch),
        row_seed=lambda *parts: row_seed(0, *parts),
    )
    objective = ppo_objective(
        policy.config, reward.config, options.precision, options.remat, temperature=1.0, clip=settings.clip,
        value_clip=settings.value_clip, value_coef=settings.value_coef,
    )  # fmt: skip
    params = {"policy": policy.params, "value": reward.params}
    state, step = start_training(
        objective, params, settings.optimizer, len(work["ppo"]) * settings.epochs, mesh, 1
    )
    losses = []
    for update, prompts in enumerate(work["ppo"]):
        prompts = [SimpleNamespace(id=str(i), messages=prompt["messages"]) for i, prompt in enumerate(prompts)]
        frozen = stage.Frozen(policy, Source("model", reward), Prompts(prompts, prompt_length), reward.config)
        clock.start()
        now = Model(policy.config, state.params["policy"], policy.tokenizer, policy.hf_config, "policy", "")
        rollouts = sample_rollouts(context, "ppo", sampler(now), frozen.prompts, f"update-{update}")
        known = 0.0, settings.kl_coef, no_scores()
        batch, *_ = stage.score_rollouts(context, frozen, state.params, rollouts, *known)
        for chosen in minibatches(settings, 0, update):
            state, metrics = step(state, context.put_rows({name: array[chosen] for name, array in batch.items()}))
        losses.append(float(metrics["loss"]))
        jax.block_until_ready(state)
        clock.stop()
    return losses


if __name__ == "__main__":
    main()
