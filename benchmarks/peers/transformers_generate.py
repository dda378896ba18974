"""Peer: transformers on torch. Every step of the chain is one `generate` call: padded on the left, the whole prompt."""

import torch
import transformers
from chain import arguments, plain_points, report, row_program, timed


def main():
    work, options = arguments()
    torch.set_num_threads(options.threads)
    tokenizer = transformers.AutoTokenizer.from_pretrained(work["model"], padding_side="left")
    model = transformers.AutoModelForCausalLM.from_pretrained(work["model"], dtype=getattr(torch, options.precision))
    model.eval()

    def generate(inputs, new_tokens):
        length = inputs["input_ids"].shape[1]
        output = model.generate(
            **inputs, do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=tokenizer.pad_token_id,
            min_new_tokens=new_tokens, max_new_tokens=new_tokens,
        )  # fmt: skip
        assert output.shape[1] == length + new_tokens
        return output[:, length:]

    def answer(conversations, new_tokens):
        inputs = tokenizer.apply_chat_template(
            conversations, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        return tokenizer.batch_decode(generate(inputs, new_tokens), skip_special_tokens=True)

    def chain(rows):
        programs = [row_program(row, work["preamble"]) for row in rows]
        asked = [next(program) for program in programs]
        while asked:
            texts = answer(asked, work["new_tokens"])
            following = [sent(program, text) for program, text in zip(programs, texts, strict=True)]
            asked = [conversation for conversation in following if conversation]

    def plain(prompts, new_tokens):
        ids = torch.tensor(prompts["ids"])
        generate({"input_ids": ids, "attention_mask": torch.ones_like(ids)}, new_tokens)

    version = {"version": f"transformers {transformers.__version__}, torch {torch.__version__}"}
    if options.part == "plain":
        report(version | plain_points(work, plain))
        return
    # Nothing is compiled: a short batch of all rows warms what there is to warm.
    answer([row["messages"] for row in work["warm_up"]], 4)
    report(version | {"rows": len(work["chains"]), "seconds": timed(lambda: chain(work["chains"]))})


def sent(program, text):
    """The next conversation of a row, or None at its end."""
    try:
        return program.send(text)
    except StopIteration:
        return None


if __name__ == "__main__":
    main()
