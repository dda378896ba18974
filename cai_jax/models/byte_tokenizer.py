"""The tokenizer of random models: bytes, some common letter groups, three control tokens, a ChatML template."""

CONTROL = ("<|pad|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2
VOCAB_SIZE = 320

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' + '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Byte-level BPE writes a space as the letter below; later merges may build on earlier ones.
_SPACE = "\u0120"
_MERGES = (
    "_ t|h e|_ a|i n|r e|_t he|o n|e r|_ s|_ w|a t|e n|o r|_ o|i t|i s|e s|_ c|_ b|_ f|_ h|_ p|a n|in g|o u"
    "|_ m|e d|_ d|_t o|_a n|an d|_o f|l l|_ y|_y ou|_i n|_ i|_i s|v e|_ l|_ n|o m|_ g|_ re|l e|_w h|u t|a l"
    "|a r|c h|_b e|_h e|_ e|_f or|s t|_ u|i c|_t h|_th at|_ it|_n o"
)


def byte_tokenizer():
    """A transformers fast tokenizer with VOCAB_SIZE tokens, in which any text can be written and read back."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(pair.split()) for pair in _MERGES.replace("_", _SPACE).split("|")]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = dict.fromkeys([*CONTROL, *alphabet, *("".join(pair) for pair in merges)])
    vocabulary = {token: number for number, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=CONTROL[0],
        bos_token=CONTROL[1],
        eos_token=CONTROL[2],
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
        model_max_length=1024,
    )
