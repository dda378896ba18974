"""The whole of Constitutional AI on a 7B model with adapters, on one machine with 8 x H100."""

from cai_jax import config as c
from cai_jax import recipes


def config() -> c.Config:
    return c.Config(
        description="all stages with LoRA on Mistral-7B-Instruct, for one machine with eight H100",
        model=recipes.frozen_mistral_7b(),
        mesh=c.Mesh(data=1, fsdp=-1),
        sampler=recipes.conversations(),
        lora=recipes.adapters(),
        critique_revision=recipes.critique_revision(),
        sft=recipes.sft(learning_rate=1e-4),
        preferences=recipes.preferences(),
        reward_model=recipes.reward_model(learning_rate=1e-4),
        ppo=recipes.ppo(learning_rate=1e-5, microbatches=4),
        # Ten looks at 64 probes; the rating is the base model's, which nothing is trained on.
        monitor=c.Monitor(every=20, response=c.Sampling(temperature=0.0, max_new_tokens=256), kl_budget=50.0),
        checkpoints=c.Checkpoints(export="frontier"),
        evaluate=recipes.evaluate(),
    )
