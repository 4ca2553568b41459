#!/usr/bin/env python3
"""Makes goldens/{prompt_cleaning,tokenizer}.json and goldens/spiece.model for the unit tests.

    pip install ftfy==6.3.1 regex transformers==5.23.0 tokenizers sentencepiece protobuf
    python3 tests/unit/model/make_text_goldens.py

Prompt cleaning: what diffusers' pipeline_wan.prompt_clean does, with ftfy and Python's html.
Tokenizer: Hugging Face tokenizers' Unigram as transformers' T5Converter sets it up (unknown id 3, no
byte fallback), over a small SentencePiece model with byte pieces, as UMT5's has them.
"""

import html
import html.entities
import io
import json
import pathlib
import types

import ftfy
import regex
import sentencepiece
from transformers.convert_slow_tokenizer import T5Converter

FOLDER = pathlib.Path(__file__).resolve().parent / "goldens"
EXTRA_IDS = 300

PROMPTS = [
    "",
    "   ",
    "a red ball rolls from left to right over a green floor",
    "  two \t cubes\n\n spin \u00a0 slowly \u2003 now ",
    "\uff2c\uff2f\uff35\uff24\u3000\uff2e\uff2f\uff29\uff33\uff25\uff33",
    "\uff35\uff80\uff70\uff9d and \uffda\uffdc \uffe0\uffe5 \uff9f\uff8a\uff9f",
    "\u8272\u8c03\u8273\u4e3d\uff0c\u8fc7\u66dd\uff0c\u9759\u6001\uff1b\u7ec6\u8282\u6a21\u7cca\u3002",
    "\u201ca \u2018ball\u2019\u201d \u2014 it\u2019s \ufb01ne, \u02bcn\u201b\u201f",
    "\ufb00 \ufb01 \ufb02 \ufb03 \ufb04 \ufb05 \ufb06 \u0132\u0133 \u0149 \u01c4\u01c5\u01c6 "
    "\u01c7\u01c8\u01c9 \u01ca\u01cb\u01cc \u01f1\u01f2\u01f3 \u00e6 \u0153",
    "cafe\u0301 na\u0131\u0308ve \u1100\u1161\u11a8 A\u030a \u212b \u2126 \u0344 \u0958",
    "a\x00b\x01c\x07d\x0be\x0cf\x1bg\x1fh\x7fi\ufeffj\ufffck\u206al\u200dm\u200en",
    "one\r\ntwo\rthree\u2028four\u2029five\nsix",
    "\x1b[36;44mblue\x1b[0m and \x1b[ not \x1b[1;x",
    "salt &amp; pepper &lt;b&gt; &amp;amp; &amp;amp;amp; &amp;amp;amp;amp;lt;",
    "&eacute; &EACUTE; &SZLIG; &MICRO; &nbsp;x&NBSP;y &hellip; &rarr; &hearts; &apos; &QUOT; &AMP",
    "&#65; &#x42; &#X43; &#x2019; &#128; &#x80; &#129; &#0; &#55296; &#1114112; &#99999999999; &#1; "
    "&#11; &#x7f; &#xfffe; &#xfdd0; &#13; &#59; &#x3b;",
    "this&not that &notit; &notin; &copy2024 &ampx &amp &lt&gt &reg; &region; &para &parallel",
    "&#65 &#x42g &#; &#x; &; & && &amp&amp; &#38;#65;",
    "AT&T & R&D; &unknown; &thisnameistoolongtobeanentity; fish&chips",
    "<b>bold</b> &amp; &lt;i&gt; \u201cquote\u201d",
    "first &amp;amp;\n<second> &amp;amp;\nthird &amp;amp;",
    "\U0001f600 \U0001f468\u200d\U0001f469\u200d\U0001f467 \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "\u0627\u0644\u0633\u0644\u0627\u0645 \u0928\u092e\u0938\u094d\u0924\u0947 "
    "\u3053\u3093\u306b\u3061\u306f \uc548\ub155",
    "e\u0301\u0327 q\u0307\u0323 \u1e0b\u0323 " + "a" + "\u0300\u0301\u0323" * 12,
    "\u1680ogham\u2000en\u202fnarrow\u205fmath\u3000wide\u200bzero",
]

TEXTS = [
    "",
    "a red ball rolls from left to right over a green floor",
    "A Slow Camera: THE SEA, at dawn; 4K!",
    "a \u6f22\u5b57 ball \u2603\u2603 rolls \U0001f600",
    "\u6f22\u5b57\u2603",
    "ball\u2603ball \u2603 \u2603\u2603",
    "zzz qqq xyzzy",
    "rolls  two   blue",
    " leading and trailing ",
    "one</s>two",
    "one </s> two",
    "</s>",
    " </s>  <pad> ",
    "<pad><s><unk></s>",
    "a <extra_id_0> b <extra_id_299> c<extra_id_17>",
    "<extra_id_300> <extra_id_> <extra_id_-1> <extra_id_01> <extra_id_1",
    "a < b <c <s",
    "a\u2581red\u2581\u2581ball",
    "<0x41> <0xE2>",
    "rollrollrollroll ballballball ov ver",
    "a new\nline\tand tab",
    "ro ll s over",
]


def prompt_clean(text):
    text = ftfy.fix_text(text)
    text = html.unescape(html.unescape(text)).strip()
    return regex.sub(r"\s+", " ", text).strip()


def named_entities():
    """Every name that model/html_entities.cc holds, in all of the forms that could be read."""
    names = sorted(set(html.entities.name2codepoint) | {"apos", "AMP", "LT", "GT", "QUOT", "COPY",
                                                        "REG"})
    # Prompts with other names that begin like a bare one are read alike; names of HTML 5 alone,
    # such as &Tab;, are not in the table.
    known = {name + ";" for name in names}
    upper = [n.upper() for n in names if n == n.lower() and n.upper() + ";" not in html.entities.html5]
    for group in (names, upper):
        for begin in range(0, len(group), 40):
            part = group[begin:begin + 40]
            yield " ".join(f"x&{name};y" for name in part)
            bare = [n for n in part if n in html.entities.html5 or n + ";" in known]
            yield " ".join(f"x&{name}" for name in bare)
            yield " ".join(f"&{name}zz;" for name in bare)


def train():
    nouns = "ball cube pyramid cylinder ring car boat bird tree river camera sea".split()
    colours = "red green blue yellow white black purple orange".split()
    verbs = "rolls slides jumps spins falls floats rises bounces".split()
    lines = [f"a {c} {n} {v} from left to right over the floor" for c in colours for n in nouns
             for v in verbs]
    lines += [f"Two {c} {n}s, slow motion; it's 4K at dawn! < >" for c in colours for n in nouns]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_writer=model, vocab_size=400, model_type="unigram",
        byte_fallback=True, character_coverage=1.0, normalization_rule_name="identity",
        remove_extra_whitespaces=False, pad_id=0, eos_id=1, bos_id=2, unk_id=3,
        hard_vocab_limit=False, num_threads=1, minloglevel=2)
    return model.getvalue()


def write(name, value):
    text = json.dumps(value, indent=1, ensure_ascii=True) + "\n"
    (FOLDER / name).write_text(text, encoding="utf-8")


def main():
    FOLDER.mkdir(exist_ok=True)
    prompts = PROMPTS + list(named_entities())
    write("prompt_cleaning.json",
          {"source": f"ftfy {ftfy.__version__}, Python's html, diffusers' prompt_clean",
           "cases": [{"prompt": p, "cleaned": prompt_clean(p)} for p in prompts]})

    path = FOLDER / "spiece.model"
    if not path.exists():  # training is not the same on every machine; the ids hang on the file
        path.write_bytes(train())
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(path))
    reader = types.SimpleNamespace(vocab_file=str(path), _extra_ids=EXTRA_IDS,
                                   convert_tokens_to_ids=pieces.piece_to_id)
    tokenizer = T5Converter(reader).converted()
    tokenizer.add_special_tokens(["</s>", "<unk>", "<pad>"]
                                 + [f"<extra_id_{i}>" for i in range(EXTRA_IDS)])
    write("tokenizer.json",
          {"source": "transformers T5Converter over spiece.model, tokenizers Unigram",
           "vocab_size": pieces.vocab_size(),
           "cases": [{"text": t, "ids": tokenizer.encode(t).ids} for t in TEXTS]})


if __name__ == "__main__":
    main()
