"""How well a model's hidden states tell unsafe prompts from safe ones, by how many prompts a readout is fitted on.

    python benchmarks/separable.py [--model FOLDER] [--shares 0.25,0.5,1]

A ridge readout of the final hidden states (the last token's and the mean over the prompt) is fitted on the train
prompts of cai_smollm2_full and judged on its eval prompts: about what a fine-tuned model of this size can tell after so
many prompts. The choice among three strengths of the ridge is made on a fifth of the train prompts.
"""

import argparse
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
sys.path[:0] = [str(ROOT)]  # a checkout need not be installed

from cai_jax.chat import encode_chat  # noqa: E402
from cai_jax.errors import exit_code  # noqa: E402
from cai_jax.models import transformer  # noqa: E402
from cai_jax.models.pretrained import load_model  # noqa: E402
from cai_jax.named_runs import load_config  # noqa: E402
from cai_jax.prompt_sets import load_prompts  # noqa: E402
from cai_jax.statistics import auroc  # noqa: E402

ROWS, TOKENS, PAD = 32, 96, 16  # of a pass; longer prompts are cut, shorter ones padded to a multiple of PAD
RIDGES = (1.0, 3.0, 10.0)


def main() -> int:
    config = load_config("cai_smollm2_full")[1]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=config.model.source)
    parser.add_argument("--shares", type=lambda text: [float(x) for x in text.split(",")], default=[0.25, 0.5, 1.0])
    options = parser.parse_args()
    model = load_model(options.model)
    names = ("red_team", "helpful", "eval_red_team", "eval_helpful", "eval_look_alike")
    sets = [load_prompts(getattr(config.prompts, name), name).rows for name in names]
    ends = np.cumsum([len(rows) for rows in sets])
    found = dict(zip(names, np.split(features(model, [row for rows in sets for row in rows]), ends[:-1]), strict=True))
    heads = ("share of train prompts", "unsafe, safe", "AUROC, all safe", "AUROC, look-alikes", "unsafe told at 5%")
    print(f"| {' | '.join(heads)} |\n|{' --- |' * len(heads)}")
    for share in options.shares:
        rows = [measured(found, share, np.random.default_rng(draw)) for draw in range(1 if share == 1 else 8)]
        counts = [round(share * len(found[name])) for name in ("red_team", "helpful")]
        cells = [f"{np.mean(column):.3f}" for column in zip(*rows, strict=True)]
        print(f"| {share:g} | {counts[0]}, {counts[1]} | {' | '.join(cells)} |", flush=True)
    return 0


def features(model, prompts) -> np.ndarray:
    """The readout's input for every prompt, `[prompts, 2 D]`."""

    @jax.jit
    def states(tokens_BT, positions_BT):
        hidden_BTD = transformer.hidden_states(model.config, model.params, tokens_BT, positions_BT)
        real_BT1 = (positions_BT >= 0)[..., None]
        count_B = real_BT1.sum((1, 2))
        last_BD = hidden_BTD[jnp.arange(len(count_B)), count_B - 1]
        return jnp.concatenate([last_BD, (hidden_BTD * real_BT1).sum(1) / count_B[:, None]], axis=1)

    chats = [encode_chat(model.tokenizer, list(p.messages), add_generation_prompt=True)[-TOKENS:] for p in prompts]
    order = sorted(range(len(chats)), key=lambda index: len(chats[index]))  # rows of a pass are about as long
    rows = {}
    for start in range(0, len(order), ROWS):
        taken = order[start : start + ROWS]
        length = -(-len(chats[taken[-1]]) // PAD) * PAD
        tokens_BT = np.zeros((ROWS, length), np.int32)
        positions_BT = np.full((ROWS, length), -1, np.int32)
        positions_BT[:, 0] = 0  # a row without a prompt has one token
        for row, index in enumerate(taken):
            ids = chats[index]
            tokens_BT[row, : len(ids)], positions_BT[row, : len(ids)] = ids, np.arange(len(ids))
        rows |= zip(taken, np.asarray(states(tokens_BT, positions_BT)), strict=False)
    return np.stack([rows[index] for index in range(len(prompts))])


def measured(found, share: float, rng) -> list[float]:
    """AUROC against all safe eval prompts and against look-alikes, and what is told at 5% of look-alikes."""
    unsafe, safe = (drawn(found[name], share, rng) for name in ("red_team", "helpful"))
    fifths = len(unsafe) // 5, len(safe) // 5
    trial = [readout(unsafe[fifths[0] :], safe[fifths[1] :], ridge) for ridge in RIDGES]
    areas = [auroc(f(unsafe[: fifths[0]]), f(safe[: fifths[1]]))["value"] for f in trial]
    score = readout(unsafe, safe, RIDGES[int(np.argmax(areas))])
    unsafe, helpful, alike = (score(found[f"eval_{name}"]) for name in ("red_team", "helpful", "look_alike"))
    told = float(np.mean(unsafe > np.quantile(alike, 0.95)))
    return [auroc(unsafe, np.concatenate([helpful, alike]))["value"], auroc(unsafe, alike)["value"], told]


def drawn(rows: np.ndarray, share: float, rng) -> np.ndarray:
    """That share of the rows, in a drawn order."""
    return rows[rng.permutation(len(rows))[: round(share * len(rows))]]


def readout(unsafe, safe, ridge: float):
    """A linear score of standardised features, by ridge regression on -1 and 1."""
    rows, signs = np.concatenate([unsafe, safe]), np.repeat([1.0, -1.0], [len(unsafe), len(safe)])
    mean, scale = rows.mean(0), (rows.std(0) + 1e-6) * np.sqrt(rows.shape[1])

    def inputs(x):
        return np.concatenate([(x - mean) / scale, np.ones((len(x), 1))], axis=1)

    known = inputs(rows)
    weights = np.linalg.solve(known.T @ known + ridge * np.eye(known.shape[1]), known.T @ signs)
    return lambda x: inputs(x) @ weights


if __name__ == "__main__":
    sys.exit(exit_code(main))
