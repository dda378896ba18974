"""The whole of Constitutional AI on a 7B model, on TPUs or GPUs."""

from cai_jax import config as c
from cai_jax import recipes


def config() -> c.Config:
    return c.Config(
        description="all stages on Mistral-7B-Instruct, sharded over every device",
        model=recipes.mistral_7b(),
        mesh=c.Mesh(data=1, fsdp=-1, tensor=4),
        sampler=recipes.conversations(),
        critique_revision=recipes.critique_revision(),
        sft=recipes.sft(learning_rate=1e-5),
        preferences=recipes.preferences(),
        reward_model=recipes.reward_model(learning_rate=1e-5),
        ppo=recipes.ppo(learning_rate=1e-6, microbatches=8),
        # Ten looks at 64 probes; the rating is the base model's, which nothing is trained on.
        monitor=c.Monitor(every=20, response=c.Sampling(temperature=0.0, max_new_tokens=256), kl_budget=50.0),
        checkpoints=c.Checkpoints(export="frontier"),
        evaluate=recipes.evaluate(),
    )
