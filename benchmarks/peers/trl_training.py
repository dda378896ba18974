"""Peer: TRL on torch. Its own trainers and defaults, but for gradient checkpointing (off) and what the work says."""

import os
import tempfile

import torch
import transformers
import trl
from datasets import Dataset
from steps import Clock, arguments, report
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback


def main():
    work, options = arguments()
    torch.set_num_threads(options.threads)
    clock, losses = Clock(), []
    part = {"sft": sft, "pairwise": pairwise, "ppo": ppo}[options.part]
    with tempfile.TemporaryDirectory() as folder:
        part(work, settings(work, options, folder), clock, losses)
    version = f"trl {trl.__version__}, transformers {transformers.__version__}, torch {torch.__version__}"
    report(version, clock, losses=losses)


def settings(work, options, folder) -> dict:
    """Arguments that all trainers take."""
    optimizer = work["optimizer"]
    return {
        "output_dir": folder, "use_cpu": True, "bf16": options.precision == "bfloat16", "gradient_checkpointing": False,
        "learning_rate": optimizer["learning_rate"], "adam_beta1": optimizer["b1"], "adam_beta2": optimizer["b2"],
        "adam_epsilon": optimizer["eps"], "max_grad_norm": optimizer["clip_norm"], "weight_decay": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "save_strategy": "no",
        "disable_tqdm": True, "dataloader_pin_memory": False,
    }  # fmt: skip


class Watch(TrainerCallback):
    """Times the steps and keeps what they log."""

    def __init__(self, clock, losses):
        self.clock, self.losses = clock, losses

    def on_step_begin(self, *_, **__):
        self.clock.start()

    def on_step_end(self, *_, **__):
        self.clock.stop()

    def on_log(self, _, __, ___, logs, **____):
        if "loss" in logs:
            self.losses.append(float(logs["loss"]))


class InOrder:
    """A trainer that takes the rows as they come."""

    def _get_train_sampler(self, *_):
        return torch.utils.data.SequentialSampler(self.train_dataset)


def causal(work):
    return AutoModelForCausalLM.from_pretrained(work["model"], dtype=torch.float32)


def scalar(work):
    return AutoModelForSequenceClassification.from_pretrained(work["reward"], num_labels=1, dtype=torch.float32)


def sft(work, common, clock, losses):
    class Trainer(InOrder, trl.SFTTrainer):
        pass

    rows = [row for step in work["sft"] for row in step]
    trainer = Trainer(
        model=causal(work),
        args=trl.SFTConfig(
            **common, per_device_train_batch_size=len(work["sft"][0]), max_length=len(rows[0]), num_train_epochs=1
        ),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=AutoTokenizer.from_pretrained(work["model"]),
        callbacks=[Watch(clock, losses)],
    )
    trainer.train()


def pairwise(work, common, clock, losses):
    class Trainer(InOrder, trl.RewardTrainer):
        pass

    pairs = [pair for step in work["pairwise"] for pair in step]
    columns = {f"{side}_ids": [pair["prompt"] + pair[side] for pair in pairs] for side in ("chosen", "rejected")}
    trainer = Trainer(
        model=scalar(work),
        args=trl.RewardConfig(
            **common, per_device_train_batch_size=len(work["pairwise"][0]), max_length=2048, num_train_epochs=1
        ),
        train_dataset=Dataset.from_dict(columns),
        processing_class=AutoTokenizer.from_pretrained(work["reward"]),
        callbacks=[Watch(clock, losses)],
    )
    trainer.train()


def ppo(work, common, clock, losses):
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    prompts = [prompt["ids"] for step in work["ppo"] for prompt in step]
    batch = len(work["ppo"][0])
    tokenizer = AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    trainer = PPOTrainer(
        args=PPOConfig(
            **common, per_device_train_batch_size=batch, num_mini_batches=1, local_rollout_forward_batch_size=batch,
            num_ppo_epochs=work["epochs"], total_episodes=len(prompts), response_length=work["new_tokens"],
            num_sample_generations=0, temperature=1.0, kl_coef=0.02, stop_token=None,
        ),
        processing_class=tokenizer, model=causal(work), ref_model=causal(work), reward_model=scalar(work),
        value_model=scalar(work), train_dataset=Dataset.from_dict({"input_ids": prompts}),
        eval_dataset=Dataset.from_dict({"input_ids": prompts[:batch]}),
    )  # fmt: skip
    watch_updates(trainer, clock)
    trainer.train()


def watch_updates(trainer, clock):
    """Time whole updates: from one batch of prompts to the log of what was learned from it."""
    batches, log = trainer.dataloader, trainer.log

    class Timed:
        def __iter__(self):
            for batch in batches:
                clock.start()
                yield batch

    def stop(*arguments, **more):
        clock.stop()
        return log(*arguments, **more)

    trainer.dataloader, trainer.log = Timed(), stop


if __name__ == "__main__":
    main()
