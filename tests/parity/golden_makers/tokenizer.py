"""The tokenizer: a small SentencePiece model of our own, read by Hugging Face's T5 converter.

The converter makes what `tokenizer.json` of the published UMT5 holds: Unigram without byte fallback,
words split behind U+2581, </s> appended. Prompts go through diffusers' `prompt_clean` first.
"""

import io
import types

import sentencepiece
import torch
from diffusers.pipelines.wan.pipeline_wan import prompt_clean
from transformers.convert_slow_tokenizer import T5Converter

SOURCE = "transformers T5Converter, tokenizers Unigram, diffusers prompt_clean"
EXTRA_IDS = 300
LENGTH = 512

TEXTS = {
    "plain": "a red ball rolls from left to right over a green floor",
    "empty": "",
    "spaces": "   two   blue \t cubes\n spin   ",
    "capitals": "A Slow Camera: THE SEA, at dawn; 4K!",
    "unknown": "a \u6f22\u5b57 ball \u2603\u2603 rolls \U0001f600",
    "unknown_alone": "\u6f22\u5b57\u2603",
    "accents": "cafe\u0301 na\u00efve fa\u00e7ade",
    "entities": "salt &amp; pepper &lt;b&gt; &amp;amp;",
    "quotes": "\u201ca \u2018ball\u2019\u201d \u2014 it\u2019s \ufb01ne",
    "full_width": "\u4e00\u4e2a\uff0c\uff21\uff22\uff23\uff01",
    "special": "one</s>two <extra_id_0> three <pad> <extra_id_299>",
    "metaspace": "a\u2581red\u2581\u2581ball",
    "long": "the green pyramid slides over a wooden table and " * 60,
    "long_word": "rollrollroll" * 80,
}


def train():
    """A vocabulary of 512 pieces with UMT5's special ids and byte pieces."""
    nouns = "ball cube pyramid cylinder ring car boat bird tree river camera sea".split()
    colours = "red green blue yellow white black purple orange".split()
    verbs = "rolls slides jumps spins falls floats rises bounces".split()
    places = "floor table grass sand water snow".split()
    lines = [f"a {c} {n} {v} from left to right over the {p}" for c in colours for n in nouns
             for v in verbs for p in places]
    lines += [f"Two {c} {n}s, slow motion; it's 4K at dawn! ({v} & spins)" for c in colours
              for n in nouns for v in verbs]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=512, model_type="unigram",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return model.getvalue()


def read(path):
    """The Hugging Face tokenizer of a SentencePiece file, and how many ids it has."""
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    reader = types.SimpleNamespace(vocab_file=str(path), _extra_ids=EXTRA_IDS,
                                   convert_tokens_to_ids=pieces.piece_to_id)
    tokenizer = T5Converter(reader).converted()
    tokenizer.add_special_tokens(["</s>", "<unk>", "<pad>"]
                                 + [f"<extra_id_{i}>" for i in range(EXTRA_IDS)])
    tokenizer.enable_truncation(LENGTH)
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>", length=LENGTH)
    return tokenizer, pieces.vocab_size() + EXTRA_IDS


def write(goldens, case, tokenizer, text, folder_name):
    encoded = tokenizer.encode(prompt_clean(text))
    ids = torch.tensor([encoded.ids], dtype=torch.int64)
    mask = torch.tensor([encoded.attention_mask], dtype=torch.int64)
    print(f"    {case}: {encoded.ids[: int(mask.sum())][:24]}")
    goldens.write(case, ["tokenizer", "--text", text], None,
                  {"input_ids": ids, "attention_mask": mask}, folder_name, SOURCE)


def make(goldens):
    """Returns the size of the vocabulary, extra ids included: the text encoder's rows."""
    folder = goldens.model("odd") / "tokenizer"
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "spiece.model"
    if not path.exists():  # training is not the same on every machine; the ids hang on the file
        path.write_bytes(train())
    tokenizer, vocab_size = read(path)
    for name, text in TEXTS.items():
        write(goldens, f"tokenizer_{name}", tokenizer, text, "odd")
    return vocab_size


def make_demo(goldens, demo):
    tokenizer, _ = read(demo / "tokenizer" / "spiece.model")
    for name, text in (("known", "a red ball rolls from left to right over a green floor"),
                       ("foreign", "A Zebra, quietly: \u6f22\u5b57 & 42 kites")):
        write(goldens, f"demo_tokenizer_{name}", tokenizer, text, "demo")
